"""Training methods: RandLoRA, LoRA, PEFT's methods, or training the model's own parameters."""
