"""Class names of a dataset and the prompt templates for them: the user's, or open_clip's."""

import csv
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.files.text import read_text
from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import clean_label, whole_number
from randlora_vision.training.data.known_data import KnownData, known_data
from randlora_vision.training.data.labelled import ImageSplits

IMAGENET = "imagenet"
_WORDNET_ID = re.compile(r"n\d{8}")
_TEMPLATE_SETS = ("openai", "simple")
_SHOWN = 3


def with_class_names(splits: ImageSplits, source: str | None, data: str | None = None) -> ImageSplits:
    """Return the splits with the class names of `source`, a file or 'imagenet', and a note of the first pairs.

    Without a source, the names are those of a well-known data set if `data` (as on the command line) is one, and
    otherwise those of the data. The 1000 classes of ImageNet get open_clip's names.

    Raises ValueError, listing the differences, when the names do not match the classes, and when a list could be
    meant in more than one order.
    """
    own = list(splits.class_names)
    known = known_data(data)
    if source is not None or (len(own) == 1000 and all(_WORDNET_ID.fullmatch(name) for name in own)):
        source = source or IMAGENET
        given = _imagenet_names() if source == IMAGENET else _read_words(Path(source), "--class-names", own)
        names = _by_key(given, own, source) if isinstance(given, dict) else _in_order(given, own, source)
    elif known is not None:
        source, names = known.title, _known_names(known, own, data or "")
    else:
        return splits
    notes = [*splits.notes]
    if names != own:
        pairs = (f"{old} = {new}" for old, new in zip(own, names, strict=True) if old != new)
        notes.append(f"class names of {source}: {listing(pairs, most=_SHOWN)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        notes.append(f"several classes have the same name, so that prompts cannot tell them apart: {listing(twice)}")
    return replace(splits, class_names=names, notes=tuple(notes))


def _known_names(known: KnownData, own: Sequence[str], data: str) -> list[str]:
    if known.title == IMAGENET:  # Hugging Face's and torchvision's are in the order of WordNet's ids
        return _imagenet_names() if len(own) == 1000 and not Path(data).exists() else list(own)
    words = {_key(name): word for name, word in known.names.items()}
    return [words.get(_key(tidied := known.tidy(name)), tidied) for name in own]


def require_words(splits: ImageSplits, data: str | None) -> None:
    """Raise ValueError if all class names are numbers or identifiers, unless a known data set has them as names."""
    known = known_data(data)
    if known is not None and set(known.names.values()) & set(splits.class_names):
        return
    codes = [name for name in splits.class_names if whole_number(name) is not None or _WORDNET_ID.fullmatch(name)]
    if len(codes) == len(splits.class_names):
        raise ValueError(
            f"the classes of {splits.name} have no names for prompts, only {listing(codes, most=_SHOWN)}: give "
            "--class-names FILE, with a line 'label,name' for every class, or train_classifier.py, which needs no names"
        )


def _by_key(given: Mapping[str, Any], own: Sequence[str], source: str) -> list[str]:
    words = {_key(key): str(name) for key, name in given.items()}
    _check_same(words, [_key(name) for name in own], source)
    return [words[_key(name)] for name in own]


def _key(name: str) -> str:
    """Return what identifies a class: its cleaned name, or its value if it is a number."""
    text = clean_label(name).replace("_", " ")
    number = whole_number(text)
    return text if number is None else str(number)


def _in_order(given: Sequence[Any], own: Sequence[str], source: str) -> list[str]:
    """Return the names after checking that they are in the order of the labels, or by number for numeric labels."""
    names = [str(name) for name in given]
    numbers = [number for name in own if (number := whole_number(name)) is not None]
    if len(numbers) == len(own):
        start = 1 if numbers == list(range(1, len(names) + 1)) else 0  # labels may count from 1
        if max(numbers) - start >= len(names):
            raise ValueError(f"--class-names {source} has {len(names)} names, but the labels go up to {max(numbers)}")
        return [names[number - start] for number in numbers]
    words = [name.replace("_", " ") for name in names]
    if len(names) != len(own):
        _check_same(words, own, source)
        raise ValueError(f"--class-names {source} has {len(names)} names, but the data has {len(own)} classes")
    moved = [(word, name) for word, name in zip(words, own, strict=True) if word != name and word in own]
    remedy = 'give a name for every class, as JSON {"folder": "name"} or as lines folder,name in a .csv file'
    if moved:
        word, name = moved[0]
        raise ValueError(
            f"--class-names {source} is not in the order of the labels: it has {word!r} where the data has {name!r}; "
            f"sort it, or {remedy}"
        )
    other = next((order for order in (_natural(own), sorted(own, key=str.casefold)) if order != list(own)), None)
    if words != list(own) and other and list(own) == sorted(own):
        place = next(i for i, name in enumerate(own) if other[i] != name)
        raise ValueError(
            f"--class-names {source} is a list, but the order of the classes can be mistaken: sorted as text "
            f"{own[place]!r} is class {place}, otherwise {other[place]!r}; {remedy}"
        )
    return names


def _natural(names: Sequence[str]) -> list[str]:
    """Return names sorted as people sort them: class2 before class10."""
    return sorted(
        names,
        key=lambda name: [
            (int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in re.split(r"(\d+)", name)
        ],
    )


def _check_same(given: Sequence[str] | Mapping[str, str], own: Sequence[str], source: str) -> None:
    if set(given) != set(own):
        missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
        parts = [f"without a name: {listing(missing)}"] if missing else []
        parts += [f"not among the classes: {listing(unknown)}"] if unknown else []
        raise ValueError(
            f"--class-names {source} does not match the data ({len(given)} names, {len(own)} classes); "
            + "; ".join(parts)
        )


def _imagenet_names() -> list[str]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Return prompts with {} for the class name: the given ones, and those in the given sets and files.

    A set is openai or simple (open_clip's 80 and 7 prompts). Raises ValueError for a prompt without {}.
    """
    templates: list[str] = []
    for item in given:
        if item in _TEMPLATE_SETS:
            templates += _open_clip_templates(item)
        elif "{}" not in item and os.path.isfile(item):
            templates += _read_words(Path(item), "--templates")
        else:
            templates.append(item)
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"--templates: {template!r} has no {{}} for the class name and is neither a file nor one of "
                f"{' and '.join(_TEMPLATE_SETS)}"
            )
    return tuple(templates)


def _open_clip_templates(name: str) -> list[str]:
    from open_clip import zero_shot_metadata

    functions = getattr(zero_shot_metadata, f"{name.upper()}_IMAGENET_TEMPLATES")
    return [function("{}") for function in functions]


def _read_words(path: Path, flag: str, own: Sequence[str] | None = None) -> Any:
    """Return the list in a file: JSON, or the lines that are not empty.

    With the classes `own`, the file may also map them to names, in JSON or in two columns; that gives a dictionary.
    """
    if not path.exists():
        raise ValueError(f"{flag}: there is no file {path}")
    text = read_text(path)
    words: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".json":
        words = parse_json(text, f"{flag}: {path}")
        if own is not None and isinstance(words, dict):
            words = _plain_names(words, own)
        kind = list[str] if own is None else list[str] | dict[str, str]
        check_type(words, kind, f"{flag}: {path}", "an entry")
    elif own is not None:
        words = _columns(words, path, own) or words
    if not words:
        raise ValueError(f"{flag}: {path} holds no names")
    if not all(word.strip() for word in (words.values() if isinstance(words, dict) else words)):
        raise ValueError(f"{flag}: {path} holds an empty name")
    return words


def _plain_names(words: dict[str, Any], own: Sequence[str]) -> Any:
    """Return names by class, or as a list, from other forms of them.

    {"0": "tench", "1": ...} is a list unless classes are numbers; of {"cat": ["cat", "kitten"]} the first name counts;
    {"0": ["n01440764", "tench"], ...} has the classes as the first of two.
    """
    keys = {_key(name) for name in own}
    lists = all(isinstance(names, list) and names for names in words.values())
    if lists and {len(names) for names in words.values()} == {2}:
        pairs = [(str(first), second) for first, second in words.values()]
        if {_key(first) for first, _ in pairs} == keys != {_key(key) for key in words}:
            return dict(pairs)
    if lists:
        words = {key: names[0] for key, names in words.items()}
    numbers = [whole_number(key) for key in words]
    if not any(whole_number(name) is not None for name in own) and set(numbers) == set(range(len(words))):
        return [name for _, name in sorted(zip(numbers, words.values(), strict=True))]
    return words


def _columns(lines: Sequence[str], path: Path, own: Sequence[str]) -> dict[str, str] | None:
    """Return the names in a file of two columns, separated by a tab or comma, or by the first ; : or space in a line.

    The first column must have the classes of the data (`own`); a first line without one names the columns. Returns
    None for a list.
    """
    keys = {_key(name) for name in own}
    rows: list[list[str]] = []
    if all("\t" in line for line in lines):
        rows = [line.split("\t", 1) for line in lines]
    elif path.suffix.lower() == ".csv":
        try:
            rows = list(csv.reader(lines, strict=True))
        except csv.Error as error:
            raise ValueError(f"--class-names: {path} is not a readable table (is a quote missing?): {error}") from error
    if not rows or any(len(row) != 2 for row in rows):
        ways = ([line.split(mark, 1) for line in lines] for mark in ";: ")
        rows = next((way for way in ways if {_key(row[0]) for row in way} == keys), [])
    if not rows or any(len(row) != 2 for row in rows):
        return None
    if _key(rows[0][0]) not in keys:
        del rows[0]
    found: dict[str, str] = {}
    for key, name in rows:
        if key in found:
            raise ValueError(f"--class-names: {path} has two names for {key!r}")
        found[key] = name.strip()
    return found
