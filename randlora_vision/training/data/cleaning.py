"""The one rule by which labels and captions are cleaned, whatever their source, and what counts as the same class."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from randlora_vision.errors import one_line
from randlora_vision.files.text import as_utf8
from randlora_vision.training.data.part import Label, Part
from randlora_vision.training.data.skipped import SkipList

_INVISIBLE = "\ufeff\u200b\u2060"  # byte order mark, zero-width space, word joiner
_WHOLE = re.compile(r"(\d+)(?:\.0+)?")  # 7, 007, and 7.0 as spreadsheets write it


def clean_label(label: Label) -> str:
    r"""Return the text of a label: NFC, without white space around it, inner white space as single spaces.

    What is not Unicode text (bytes of a folder's name, lone surrogates) is spelled out: ``\xe9``.

    It is empty for an image without a class: no label, only white space, NaN (in words too) or -1.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    text = one_line(unicodedata.normalize("NFC", as_utf8(label)).strip(_INVISIBLE)).strip(_INVISIBLE)
    return "" if text.lower() in ("-1", "-1.0", "nan", "<na>") else text


def whole_number(label: str) -> int | None:
    """Return the value of a label that is a whole number: '7', '007' and '7.0' are the same class."""
    match = _WHOLE.fullmatch(label)
    return int(match[1]) if match else None


def clean_caption(caption: str | None) -> str:
    """Return a caption without white space and invisible characters around it; empty for a missing one.

    Lone surrogates, for which tokenizers raise errors, are spelled out.
    """
    return "" if caption is None else as_utf8(caption).strip().strip(_INVISIBLE).strip()


def cleaned(part: Part, skipped: SkipList) -> Part:
    """Clean the labels or captions of a part, and leave out images without any; record both in `skipped`."""
    return _clean_labels(part, skipped) if part.captions is None else _clean_captions(part, part.captions, skipped)


def _clean_labels(part: Part, skipped: SkipList) -> Part:
    known = {label: clean_label(label) for label in set(part.labels or ())}
    labels = [known[label] for label in part.labels or ()]
    kept = [index for index, label in enumerate(labels) if label]
    for image, before, after in zip(part.images, part.labels or (), labels, strict=True):
        if not after:
            skipped.add(f"the label of {part.source}, {image}", "it has no class")
        elif str(before) != after:
            skipped.change(f"the label of {part.source}, {image}", "white space or Unicode form of a label cleaned")
    return replace(part, labels=labels).take(kept)


def _clean_captions(part: Part, captions: Sequence[Sequence[str | None]], skipped: SkipList) -> Part:
    found = [[text for caption in texts if (text := clean_caption(caption))] for texts in captions]
    for image, before, after in zip(part.images, captions, found, strict=True):
        if not after:
            skipped.add(f"the caption of {part.source}, {image}", "it is empty")
        elif list(before) != after:
            skipped.change(f"the caption of {part.source}, {image}", "white space around a caption removed")
    return replace(part, captions=found).take(index for index, texts in enumerate(found) if texts)


class Classes:
    """The distinct labels of some images as classes, in order: of their values if all are whole numbers, else sorted.

    A number that is spelled in several ways has its shortest spelling as name.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        distinct = sorted(set(labels), key=lambda label: (len(label), label))
        self._numbers = all(whole_number(label) is not None for label in distinct)
        names: dict[Any, str] = {}
        for label in distinct:
            names.setdefault(self._key(label), label.partition(".")[0] if self._numbers else label)
        self._names = {key: names[key] for key in sorted(names)}
        self._positions = {key: position for position, key in enumerate(self._names)}

    @property
    def names(self) -> list[str]:
        """The names of the classes 0, 1, 2..."""
        return list(self._names.values())

    def position(self, label: str) -> int | None:
        """Return the number of a label's class, or None for a label that is not a class."""
        return self._positions.get(self._key(label))

    def _key(self, label: str) -> int | str | None:
        return whole_number(label) if self._numbers else label


def look_alike(names: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Return the groups of names that differ only in case or underscores, or are spellings of one number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = whole_number(name)
        plain = one_line(name.replace("_", " ")).casefold() if number is None else str(number)
        groups.setdefault(plain, []).append(name)
    return {name: group for name, group in groups.items() if len(group) > 1}
