"""tyro's parsers of the scripts, made once: it takes a tenth of a second, and the scripts run hundreds of times."""

from __future__ import annotations

from typing import Any


def keep_parsers() -> None:
    """Let tyro make the parser of a command line at its first use only."""
    try:
        from tyro._parsers import ParserSpecification
    except ImportError:  # in another version of tyro, the suite only takes longer
        return
    make, kept = ParserSpecification.from_callable_or_type, {}

    def parser(f: Any, *args: Any, **options: Any) -> Any:
        if getattr(getattr(f, "__origin__", None), "__name__", "") != "CommandLine":
            return make(f, *args, **options)
        if f not in kept:
            kept[f] = make(f, *args, **options)
        return kept[f]

    ParserSpecification.from_callable_or_type = staticmethod(parser)
