"""The exact, memory-efficient autograd core."""
