"""Adapters as LoRA files or merged weights."""
