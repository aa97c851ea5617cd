"""The help of a script: its options by group, with their types, defaults and names in other scripts.

By hand, because tyro's help shows every option at once, and knows neither the defaults that depend on the method and
the data nor the flags of other scripts.
"""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from randlora_vision.errors import one_line
from randlora_vision.training.harness.config_file import ConfigFile
from randlora_vision.training.harness.flags import Alias, Table, aliases_of

_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


def help_text(options: type, description: str, table: Table, defaults: Mapping[str, str], everything: bool) -> str:
    """Return the help, with the first clause on each common option, or with everything on all of them."""
    width = max(40, min(shutil.get_terminal_size().columns, 100) - 1)
    aliases = aliases_of(table)
    paragraphs = [textwrap.fill(one_line(part), width, break_on_hyphens=False) for part in description.split("\n\n")]
    lines = ["\n\n".join(paragraphs)]
    left: list[str] = []
    for name, group in [*get_type_hints(options).items(), ("file", ConfigFile)]:
        texts, hints = _texts(group), get_type_hints(group)
        shown: list[str] = []
        for member in fields(group):
            flag = "--" + member.name.replace("_", "-")
            if not everything and "rare" in member.metadata:
                left.append(flag)
                continue
            text, default = _default(member, texts[member.name], defaults.get(flag))
            also = aliases.get(flag, [])
            shown += _entry(flag, hints[member.name], default, text, also, width, everything)
        if shown:
            lines += ["", f"{one_line((group.__doc__ or name).partition('. ')[0]).rstrip('.')}:", *shown]
    if left:
        lines += ["", *textwrap.wrap(f"Described by --help-all: {', '.join(left)}", width, break_on_hyphens=False)]
    return "\n".join(lines)


def _texts(group: type) -> dict[str, str]:
    """Return the docstring of every field, that of a subclass in place of its base's."""
    found: dict[str, str] = {}
    for part in reversed(group.__mro__[:-1]):
        for parameter in docstring_parser.parse_from_object(part).params:
            found[parameter.arg_name] = one_line(parameter.description or "")
    return found


def _default(member: "Field[Any]", text: str, known: str | None) -> tuple[str, str]:
    """Return the text and the default, which the text may name in a last sentence where it depends on other things."""
    text, _, described = text.partition(" Default: ")
    value = member.default if member.default is not MISSING else None
    if known or described:
        return text, known or described.rstrip(".")
    if value is None or value == ():
        return text, "none"
    return text, {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _entry(
    flag: str, kind: Any, default: str, text: str, aliases: list[Alias], width: int, everything: bool
) -> Iterator[str]:
    names = list(dict.fromkeys([flag, *(str(alias) for alias in aliases if alias.exact and not alias.value)]))
    others = list(dict.fromkeys(str(alias) for alias in aliases if not alias.exact or alias.value))
    if kind is bool and default == "on":
        names.append(f"--no-{flag[2:]}")
    metavar = _metavar(kind)
    head = f"{', '.join(names)}{' ' if metavar else ''}{metavar}  (default: {default})"
    yield from _wrap(head, width, "  ", "    ")
    if not everything:
        text = f"{re.split(r'[.;] ', text, maxsplit=1)[0].rstrip('.')}."
    if others and everything:
        text += f" Also: {', '.join(others)}."
    yield from _wrap(text, width, " " * 6, " " * 6)


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _metavar(kind: Any) -> str:
    if kind is bool:
        return ""
    if get_origin(kind) in (Union, UnionType):
        kinds = [_metavar(part) for part in get_args(kind) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else f"{{{','.join(text.strip('{}') for text in kinds)}}}"
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return f"{_metavar(parts[0])} ..." if parts[1:] == (...,) else " ".join(map(_metavar, parts))
    if get_origin(kind) is Literal:
        values = [str(value) for value in get_args(kind)]
        return f"{{{(', ' if len(values) > 6 else ',').join(values)}}}"  # a long list is broken at its spaces
    return _TYPES[kind]
