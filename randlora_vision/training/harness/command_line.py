"""The parser that builds the options of a script from its command line and its --config file."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from randlora_vision.errors import one_line
from randlora_vision.names import close_matches
from randlora_vision.training.harness.config_file import ConfigFile, config_words
from randlora_vision.training.harness.flags import HUGGING_FACE, Table, translate
from randlora_vision.training.harness.help import help_text

_Options = TypeVar("_Options")
_HELP = {"-h": False, "--help": False, "--help-all": True}
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)  # this help is not tyro's
_RIVALS = (
    ("--steps", "--epochs"),
    ("--warmup-fraction", "--warmup-steps", "--warmup-epochs"),
    ("--eval-every", "--eval-epochs"),
    ("--checkpoint-every", "--checkpoint-epochs"),
    ("--decay-steps", "--decay-epochs"),
)
"""Options that set the same thing in different units."""
_CONSTRUCTORS = ConstructorRegistry()


@_CONSTRUCTORS.primitive_rule
def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Read integers as open_clip does, for which 4e8 and 131072000.0 are numbers of samples."""

    def read(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            number = float(words[0])
            if not number.is_integer():  # nor are infinity and NaN
                raise
            return int(number)

    return PrimitiveConstructorSpec(1, "INT", read, _is_int, lambda number: [str(number)]) if info.type is int else None


def _is_int(value: object) -> bool:
    return isinstance(value, int)


def parse(
    options: type[_Options],
    argv: Sequence[str] | None,
    description: str,
    foreign: Table | None = None,
    defaults: Mapping[str, str] | None = None,
) -> _Options:
    """Build `options` (a dataclass of option groups) from a command line and the file that `--config` names.

    A mistake in either raises ValueError with a one-line message; `--help` and `--help-all` print and exit. The names
    of the groups are not part of the flags: `training.lr` is `--lr`. `foreign` maps flags of other scripts to what
    they mean here, in addition to those of the Hugging Face libraries. `defaults` has the defaults that depend on
    other options, for the help, by flag.
    """
    table = {**HUGGING_FACE, **(foreign or {})}
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word in _HELP:
            print(help_text(options, description, table, defaults or {}, everything=_HELP[word]))
            raise SystemExit(0)
    own = translate(argv, options, table)
    file = translate(config_words(own, options, table), options, table)
    words = [*without_rivals(file, own), *own]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _CONSTRUCTORS:
            command_line = _command_line(options)  # type: ignore[arg-type]  # classes are hashable
            return tyro.cli(command_line, args=words, config=_STYLE).options
    except SystemExit:
        raise ValueError(_one_line_complaint(complaint.getvalue(), table)) from None


@functools.cache
def _command_line(options: type) -> type:
    """Options and `--config` in one class. With help texts of its own, tyro does not look for any in source files."""
    groups = [("options", options), ("file", ConfigFile)]
    members = [(name, group, field(default_factory=group, metadata={"help": name})) for name, group in groups]
    return make_dataclass("CommandLine", members)


def without_rivals(file: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the words of a file without the options that the command line sets in another unit.

    Raises ValueError for rivals in the same place.
    """
    for words in (file, own):
        given = {word.partition("=")[0] for word in words}
        for rivals in _RIVALS:
            both = [flag for flag in rivals if flag in given]
            if len(both) > 1:
                raise ValueError(f"{' and '.join(both)} set the same thing: give only one")
    given = {word.partition("=")[0] for word in own}
    replaced = {rival for rivals in _RIVALS if given.intersection(rivals) for rival in rivals}
    return [word for word in file if word.partition("=")[0] not in replaced]


def _one_line_complaint(box: str, table: Table) -> str:
    """Turn tyro's framed message into one line: what is wrong, then similar flags."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [one_line(section) for section in re.split("(?:─|-){10,}", "\n".join(lines))]
    if "╭" not in box:  # without UTF-8, tyro draws no frame: the title is a section
        del sections[0]
    what, *rest = sections
    what = re.sub(r"^Error parsing (?!--)\S+: ", "", what).rstrip(".")  # an option group's name does not help
    no_type = (
        r"Error parsing (--[\w-]+): no type matching (?:\{None\}\|)?(\S+) could be instantiated from \['(.*?)'\].*"
    )
    what = re.sub(no_type, r"\1 must be \2, got \3", what)
    similar = {
        flag
        for section in rest
        if section.startswith(("Perhaps you meant", "Arguments similar to"))
        for flag in re.findall(r"(?<= )--(?!no-)[\w-]+", section.partition(":")[2])
    }
    unknown = re.findall(r"--[\w-]+", what) if what.startswith("Unrecognized") else []
    if not similar and unknown:
        hint = close_matches(unknown[0], list(table), cutoff=0.8)
        similar = set(re.findall(r"--[\w-]+", hint))
    suggestion = f" Perhaps you meant {' or '.join(sorted(similar))}." if similar else ""
    return f"{what}.{suggestion} (--help-all lists every option)"
