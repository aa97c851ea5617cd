"""JSON from outside: parsed and checked by type, with errors that name the file, the key and both types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from randlora_vision.names import listing, printable

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a JSON object",
    NoneType: "null",
}


def parse_json(text: str | bytes, where: object) -> Any:
    """Return the value of a JSON text; raise ValueError, starting with `where`, if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {printable(str(error), 200)}") from None


def check_type(value: Any, kind: Any, where: object, key: str = "") -> Any:
    """Return a value parsed from JSON if it is of a type; raise ValueError, which names the place, if not.

    `kind` is ``bool``, ``int``, ``float`` (an integer is one too), ``str``, ``list[...]``, ``dict[str, ...]``, or a
    union of these and None. ``True`` is not an integer, and 3.0 is not one either. `where` is the file and the place in
    it, `key` the key of the value or the path to it.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for each in kinds:
        if not _is(value, get_origin(each) or each):
            continue
        if get_args(each):
            for name, part in value.items() if isinstance(value, dict) else enumerate(value):
                check_type(part, get_args(each)[-1], where, f"{key}[{name!r}]")
        return value
    expected = " or ".join(dict.fromkeys(_WORDS[get_origin(each) or each] for each in kinds))
    found = _WORDS.get(type(value), type(value).__name__)
    raise ValueError(f"{where}: {printable(key or 'it', 200)} must be {expected}, got {found}")


def check_object(value: Any, kinds: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the listed keys of a JSON object, None for one that may be null and is absent; or raise ValueError."""
    check_type(value, dict, where)
    absent = [key for key, kind in kinds.items() if key not in value and NoneType not in get_args(kind)]
    if absent:
        raise ValueError(f"{where}: it lacks {listing(absent)}")
    return {key: check_type(value.get(key), kind, where, key) for key, kind in kinds.items()}


def _is(value: Any, kind: type) -> bool:
    return type(value) in (int, float) if kind is float else type(value) is kind
