"""Class names of a dataset and the prompt templates for them: the user's, or open_clip's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.data.labelled import ImageSplits

IMAGENET = "imagenet"
_WORDNET_ID = re.compile(r"n\d{8}")
_TEMPLATE_SETS = ("openai", "simple")


def with_class_names(splits: ImageSplits, source: str | None) -> ImageSplits:
    """Return the splits with the class names of `source`, a file or 'imagenet'.

    Without a source the names stay, except that the 1000 folder names of ImageNet (WordNet ids) are replaced
    by open_clip's names.

    Raises ValueError, listing the differences, when the names do not match the classes.
    """
    own = list(splits.class_names)
    if source is None:
        if len(own) != 1000 or not all(_WORDNET_ID.fullmatch(name) for name in own):
            return splits
        source = IMAGENET
    given = _imagenet_names() if source == IMAGENET else _read_words(Path(source), "--class-names")
    names = _by_folder(given, own, source) if isinstance(given, dict) else _in_order(given, own, source)
    return replace(splits, class_names=names)


def _by_folder(given: Mapping[str, Any], own: Sequence[str], source: str) -> list[str]:
    """Return the name of every class, looked up by its name in the data."""
    words = {key.replace("_", " "): str(name) for key, name in given.items()}
    _check_same(set(words), set(own), source)
    return [words[name] for name in own]


def _in_order(given: Sequence[Any], own: Sequence[str], source: str) -> list[str]:
    """Return the names unchanged after checking that they are in the order of the labels."""
    names = [str(name) for name in given]
    if own == [str(number) for number in range(len(own))]:  # the data has only numbers, perhaps not all of them
        if len(names) < len(own):
            raise ValueError(f"--class-names {source} has {len(names)} names, but the labels go up to {len(own) - 1}")
        return names
    words = [name.replace("_", " ") for name in names]
    if len(names) != len(own):
        _check_same(set(words), set(own), source)
        raise ValueError(f"--class-names {source} has {len(names)} names, but the data has {len(own)} classes")
    moved = [(word, name) for word, name in zip(words, own, strict=True) if word != name and word in own]
    if moved:
        word, name = moved[0]
        raise ValueError(
            f"--class-names {source} is not in the order of the labels: it has {word!r} where the data has {name!r}; "
            'sort it, or give JSON with a name for every class: {"folder": "name"}'
        )
    return names


def _check_same(given: set[str], own: set[str], source: str) -> None:
    if given != own:
        missing, unknown = sorted(own - given), sorted(given - own)
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

    Raises ValueError for a prompt without {}, and for anything that is not a prompt, a set or a file.
    """
    templates: list[str] = []
    for item in given:
        if item in _TEMPLATE_SETS:
            templates += _open_clip_templates(item)
        elif "{}" not in item and Path(item).is_file():
            templates += _read_words(Path(item), "--templates", kinds=(list,))
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


def _read_words(path: Path, flag: str, kinds: Sequence[type] = (list, dict)) -> Any:
    """Return the list or dictionary in a JSON file, or the non-empty lines of a text file."""
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}")
    text = path.read_text(encoding="utf-8-sig")
    words: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix == ".json":
        kind = list[str] | dict[str, str] if dict in kinds else list[str]
        words = check_type(parse_json(text, f"{flag}: {path}"), kind, f"{flag}: {path}", "an entry")
    if not words:
        raise ValueError(f"{flag}: {path} holds no names")
    if not all(word.strip() for word in (words.values() if isinstance(words, dict) else words)):
        raise ValueError(f"{flag}: {path} holds an empty name")
    return words
