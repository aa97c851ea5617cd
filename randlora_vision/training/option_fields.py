"""What an option says of itself besides its type, default and help, and how messages name it."""

from dataclasses import fields
from typing import Any

FREE = {"free": True}
"""Metadata of options, or groups of options, that may differ on resuming."""
PLACE = {"place": True}
"""Metadata of options that say where the images are: they may differ on resuming if the images are the same."""
RARE = {"rare": True}
"""Metadata of options that only --help-all describes."""


def flag(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")


def marked_settings(options: Any, mark: str) -> list[str]:
    """Return the settings, and whole groups of settings, with this metadata: ``"run"``, ``"training.workers"``."""
    found = []
    for group in fields(options):
        members = () if mark in group.metadata else fields(getattr(options, group.name))
        found += [f"{group.name}.{member.name}" for member in members if mark in member.metadata]
        found += [group.name] if mark in group.metadata else []
    return found
