"""The small harness that every training script shares."""
