"""The training loop and what stands around it, the same for every task."""
