"""Fine-tuning diffusion pipelines on a subject."""
