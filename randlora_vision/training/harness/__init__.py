"""The training loop and its supporting code, the same for every task."""
