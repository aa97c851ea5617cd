"""What options check of themselves: bounds, and other options that they need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

import pytest

from randlora_vision.training.classifier.options import ClassifierOptions
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.option_fields import ABOVE_0, FRACTION, RARE, Options, default_settings, needs


@dataclass(frozen=True)
class First(Options):
    share: float = field(default=0.0, metadata=FRACTION)
    size: int | str | None = field(default=None, metadata=ABOVE_0 | RARE)


@dataclass(frozen=True)
class Second(Options):
    color_file: str | None = field(default=None, metadata=needs("use_colors"))
    use_colors: bool = False


@dataclass(frozen=True)
class Both(First, Second):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.5}, "--share must be between 0 and 1, got 1.5"),
        ({"share": float("nan")}, "--share must be between 0 and 1, got nan"),
        ({"size": 0}, "--size must be above 0, got 0"),
        ({"color_file": "x"}, "--color-file needs --use-colors"),
    ],
)
def test_wrong_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Both(**given)


def test_right_values_and_values_that_are_not_numbers_pass() -> None:
    Both(share=1.0, size="auto", color_file="x", use_colors=True)


def groups() -> Iterator[type]:
    for script in (ClipOptions, ClassifierOptions, DreamBoothOptions):
        yield from get_type_hints(script).values()


@pytest.mark.parametrize("group", sorted(set(groups()), key=lambda group: group.__module__ + group.__name__))
def test_a_redeclared_option_keeps_the_checks_of_its_base(group: Any) -> None:
    own = {member.name: member.metadata for member in fields(group)}
    for base in group.__mro__[1:-1]:
        for name, member in vars(base).get("__dataclass_fields__", {}).items():
            kept = {mark: own[name].get(mark) for mark in member.metadata if mark in ("bound", "needs")}
            assert all(member.metadata[mark] == value for mark, value in kept.items()), (group, name)
    assert issubclass(group, Options)


@pytest.mark.parametrize("script", [ClipOptions, ClassifierOptions, DreamBoothOptions])
def test_defaults_are_those_of_options_that_are_not_given(script: Any) -> None:
    options = script(**{name: group() for name, group in get_type_hints(script).items()})
    assert json.dumps(default_settings(options)) == json.dumps(asdict(options))
