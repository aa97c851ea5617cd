"""RandLoRA (full-rank parameter-efficient fine-tuning, arXiv 2502.00987) for vision models."""
