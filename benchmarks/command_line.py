"""The command line of a benchmark, whose help is the benchmark's docstring."""

import argparse


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of options, and keeps the lines of the docstring."""


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.NAME`: the first paragraph of `doc` precedes the options."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=summary, epilog=rest, formatter_class=_Formatter
    )
