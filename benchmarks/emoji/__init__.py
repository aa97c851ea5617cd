"""The pipeline of the emoji demo: its data, its parts, and its training."""
