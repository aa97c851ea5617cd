"""Accuracy of RandLoRA and its rivals on pretrained weights: `python -m benchmarks.quality --help`."""
