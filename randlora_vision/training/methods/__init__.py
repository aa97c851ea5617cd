"""What is trained: RandLoRA, LoRA, PEFT's methods, or the model's own parameters."""
