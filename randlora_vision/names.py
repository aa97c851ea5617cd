"""Names of weights: the names of lambda and gamma, name matching, and readable lists of names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

PARTS = ("lambda", "gamma")


def parameter_name(param: str, part: str, adapter_name: str) -> str:
    """Name under which an adapter's lambda or gamma for `param` is registered on the module."""
    return f"{param}_randlora_{part}_{adapter_name}"


def is_adapter_name(path: str) -> bool:
    """True for the path of a lambda or gamma."""
    return "_randlora_" in path.rpartition(".")[2]


def matches_suffix(pattern: str, path: str) -> bool:
    """True if `pattern` equals whole trailing components of the dotted `path`."""
    return path == pattern or path.endswith("." + pattern)


def matches_any(pattern: str, paths: tuple[str, ...]) -> bool:
    """True if `pattern` matches one of a target's paths (module path, parameter path, aliases)."""
    return any(matches_suffix(pattern, path) for path in paths)


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
        group = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        counts[group] = counts.get(group, 0) + 1
    return [f"{group} (x{count})" if count > 1 else group for group, count in counts.items()]


def close_matches(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint for a misspelt name, such as ``close matches: adam, adamw``; empty if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"close matches: {', '.join(close)}" if close else ""


def listing(names: Iterable[str], most: int = 5) -> str:
    """Return the first `most` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short_name(model: str) -> str:
    """Return the last part of a path or hub id, without the fingerprint that ends the name of a cached folder."""
    return re.sub(r"-[0-9a-f]{12}$", "", model.rstrip("/").rpartition("/")[2])
