"""Names of weights: the names of lambda and gamma, name matching, and names and other texts in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence, Set

PARTS = ("lambda", "gamma")
NAME = "{}_randlora_{}_{}"
"""Format of a name of lambda or gamma: the adapted parameter, the part, the adapter."""
MESSAGE_LIMIT = 2000
"""Maximum characters of a message that includes text from a file."""


def parameter_name(param: str, part: str, adapter_name: str) -> str:
    """Name under which an adapter's lambda or gamma for `param` is registered on the module."""
    return NAME.format(param, part, adapter_name)


def is_adapter_name(path: str) -> bool:
    """True for the path of a lambda or gamma."""
    return "_randlora_" in path.rpartition(".")[2]


def matches_suffix(pattern: str, path: str) -> bool:
    """True if `pattern` equals whole trailing components of the dotted `path`."""
    return path == pattern or path.endswith("." + pattern)


def matches_any(pattern: str, paths: tuple[str, ...]) -> bool:
    """True if `pattern` matches one of a target's paths (module path, parameter path, aliases)."""
    return any(matches_suffix(pattern, path) for path in paths)


def suffixes(path: str) -> Iterator[str]:
    """Every name that `matches_suffix` accepts for `path`, the whole path first."""
    while path:
        yield path
        path = path.partition(".")[2]


def matches_one_of(wanted: Set[str], paths: Iterable[str]) -> bool:
    """True if one of the names, however many, matches one of the paths as `matches_suffix` does."""
    return not wanted.isdisjoint(suffix for path in paths for suffix in suffixes(path))


def is_preset(target_modules: str) -> bool:
    """True for the form ``integration:preset``."""
    return re.fullmatch(r"[a-z_]+:[a-z0-9_-]+", target_modules) is not None


def with_parents(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The paths and the paths of all their parent modules."""
    return tuple(path.rsplit(".", i)[0] for path in paths for i in range(path.count(".") + 1))


def summarise(names: list[str]) -> list[str]:
    """Combine names that differ only in their numbers into one: ``blocks.*.attn.qkv (x12)``."""
    counts: dict[str, int] = {}
    for name in names:
        group = without_numbers(name)
        counts[group] = counts.get(group, 0) + 1
    return [f"{group} (x{count})" if count > 1 else group for group, count in counts.items()]


def close_matches(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint for a misspelt name, such as ``close matches: adam, adamw``; empty if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"close matches: {', '.join(close)}" if close else ""


def without_numbers(name: str) -> str:
    """The name with ``*`` for every component that is a number: ``blocks.*.attn.qkv``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def listing(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first `most` names, or other short texts, made printable, and how many more there are."""
    names = list(names)
    shown = separator.join(printable(name, 300) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(count: float, noun: str) -> str:
    """Return a number with a noun, which is given in the singular: 1 image, 2 images, 3 classes."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table whose first row is its head; all but the `left` first columns are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def printable(text: str, most: int = MESSAGE_LIMIT) -> str:
    """Return a text from outside as it may be printed: at most `most` characters, in one line.

    Control characters, line breaks, characters that change the direction of writing and lone surrogates are escaped
    as in a Python string.
    """
    if len(text) > most:
        end = f" ... ({len(text):,} characters)"
        text = text[: max(0, most - len(end))] + end
    escaped = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return escaped if len(escaped) <= most else escaped[: most - 4] + " ..."


def short_name(model: str) -> str:
    """Return the last part of a path or hub id, without the fingerprint that ends the name of a cached folder."""
    return re.sub(r"-[0-9a-f]{12}$", "", model.rstrip("/").rpartition("/")[2])
