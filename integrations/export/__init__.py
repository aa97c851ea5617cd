"""Export adapters as LoRA files or as merged weights."""
