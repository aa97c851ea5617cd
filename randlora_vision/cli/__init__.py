"""The `randlora` command."""

import sys
from collections.abc import Sequence

from randlora_vision.versions import versions


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit codes are 0 (success), 1 (a check failed) and 2 (bad input, one line on stderr)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--version"]:  # needs none of the command's libraries, so that it can report missing ones
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return
    if argv[:1] == ["doctor"]:
        from randlora_vision.cli.doctor import doctor

        raise SystemExit(doctor(argv[1:]))
    if argv[:1] == ["train"]:
        from randlora_vision.cli.train import start

        return start(argv[1:])
    try:
        import rich  # noqa: F401 - the only library that just the command needs
    except ModuleNotFoundError:
        print("error: the randlora command needs rich: pip install 'randlora_vision[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from randlora_vision.cli.command import run

    run(argv)
