"""The `randlora` command."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit codes are 0 (well), 1 (verification failed) and 2 (bad input, one line on stderr)."""
    try:
        import rich  # noqa: F401 - the one library that only the command needs
    except ModuleNotFoundError:
        print("error: the randlora command needs rich: pip install 'randlora_vision[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from randlora_vision.cli.command import run

    run(argv)
