"""What an option says of itself besides its type, default and help: its bounds, what it needs, and where it counts."""

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

FREE = {"free": True}
"""Metadata of options, or groups of options, that may differ on resuming."""
PLACE = {"place": True}
"""Metadata of options that say where the images are: they may differ on resuming if the images are the same."""
RARE = {"rare": True}
"""Metadata of options that only --help-all describes."""
AT_LEAST_0 = {"bound": "0 or more"}
AT_LEAST_1 = {"bound": "1 or more"}
ABOVE_0 = {"bound": "above 0"}
FRACTION = {"bound": "between 0 and 1"}
PART = {"bound": "above 0 and at most 1"}
INSIDE = {"bound": "above 0 and below 1"}
BELOW_1 = {"bound": "at least 0 and below 1"}
_BOUNDS: Mapping[str, Callable[[float], bool]] = {
    "0 or more": lambda value: value >= 0,
    "1 or more": lambda value: value >= 1,
    "above 0": lambda value: value > 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "above 0 and below 1": lambda value: 0 < value < 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
}


def needs(name: str) -> dict[str, str]:
    """Return the metadata of an option that has a meaning only together with another one of its group."""
    return {"needs": name}


class Options:
    """A group of options. On construction it checks the bounds of its fields, and what they need."""

    def __post_init__(self) -> None:
        """Raise ValueError for the first option that is out of its bounds or lacks what it needs."""
        for member in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            self._check(member, getattr(self, member.name))

    def _check(self, member: "Field[Any]", value: Any) -> None:
        bound, partner = member.metadata.get("bound"), member.metadata.get("needs")
        if bound and isinstance(value, int | float) and not _BOUNDS[bound](value):
            raise ValueError(f"{flag(member.name)} must be {bound}, got {value}")
        if partner and value != member.default and not getattr(self, partner):
            raise ValueError(f"{flag(member.name)} needs {flag(partner)}")


def flag(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")


def named_values(flag: str, words: Sequence[str], taken: Collection[str] = ()) -> dict[str, Any]:
    """Return words of the form NAME=VALUE by name; a value that is not a Python literal is a string.

    Raises ValueError for other words, and for names that are `taken`, because other options set them.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or name in taken:
            other = f" with a name other than {', '.join(taken)}" if taken else ""
            raise ValueError(f"{flag} {word}: expected NAME=VALUE{other}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def without(options: Any, *names: str) -> dict[str, Any]:
    """Return the fields of `options` (a dataclass) except `names`, as the arguments of another dataclass."""
    return {name: value for name, value in vars(options).items() if name not in names}


def marked_settings(options: Any, mark: str) -> list[str]:
    """Return the settings, and whole groups of settings, with this metadata: ``"run"``, ``"training.workers"``."""
    found = []
    for group in fields(options):
        members = () if mark in group.metadata else fields(getattr(options, group.name))
        found += [f"{group.name}.{member.name}" for member in members if mark in member.metadata]
        found += [group.name] if mark in group.metadata else []
    return found


def default_settings(options: Any) -> dict[str, dict[str, Any]]:
    """Return the defaults of the options in every group, by name; options without a default are left out."""
    found: dict[str, dict[str, Any]] = {}
    for group in fields(options):
        members = found[group.name] = {}
        for member in fields(getattr(options, group.name)):
            if member.default is not MISSING:
                members[member.name] = member.default
            elif member.default_factory is not MISSING:
                members[member.name] = member.default_factory()
    return found
