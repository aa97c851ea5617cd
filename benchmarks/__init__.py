"""Speed, memory and size, side by side with PEFT in one run: `python -m benchmarks.step --help`."""
