"""Fine-tuning CLIP and SigLIP models."""
