"""Speed, memory and file size, compared with PEFT in one run: `python -m benchmarks.step --help`."""
