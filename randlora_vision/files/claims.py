"""The bases of an adapter file: that they are those of the training, and not larger than a file may make them."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from randlora_vision.bases import Bases, get_bases
from randlora_vision.checksums import NAMES, Checksum
from randlora_vision.errors import printable_errors
from randlora_vision.files.adapter_file import AdapterFile

_ROW = 1024  # columns whose numbers take as long to draw as starting a row
_DRAWN_ANYWAY = 2**27  # numbers of B that are drawn for any file: one layer of the largest models


def bases_of(path: str | os.PathLike[str], content: AdapterFile) -> Bases:
    """Return the bases of an adapter without its model, after checking their checksum.

    Raises:
        ValueError: If the checksum is wrong, or if the file claims bases that are far larger than its content: unlike
            the narrow side of a layer, nothing in a file proves the wide one, and only the model can.
    """
    if content.stored is not None:
        return content.stored
    numbers = sum(tensor.numel() for pair in content.trained.values() for tensor in pair)
    spec = content.spec
    # Every row takes a while by itself.
    claimed, most = spec.wide * (spec.columns + _ROW), max(_DRAWN_ANYWAY, 64 * numbers)
    if claimed > most:
        raise ValueError(
            f"{path} claims bases of {spec.wide:,} x {spec.columns:,} numbers, but holds only {numbers:,}: they are "
            "not made without the model that they are for (randlora verify --model)"
        )
    bases = get_bases(spec)
    check_bases(path, content.bases_checksum, bases)
    return bases


@printable_errors
def check_bases(path: str | os.PathLike[str], expected: Checksum | None, bases: Bases) -> None:
    """Raise ValueError unless the bases, which are drawn for this, are those that an adapter was trained with."""
    if expected is None:
        return
    algorithm, digits = expected
    found = bases.checksum(algorithm)
    if found != digits:
        raise ValueError(
            f"{path}: the bases made from seed {bases.spec.seed} are not those that the adapter was trained with "
            f"({NAMES[algorithm]} {_short(found)}, expected {_short(digits)})"
        )


class LaterCheck:
    """Stands for `check_bases` before the first use of the bases, as long as this or a copy of it exists."""

    def __init__(self, path: str | os.PathLike[str], expected: Checksum | None, bases: Bases) -> None:
        self._arguments = (path, expected, bases)
        bases.check_before_use(partial(check_bases, path, expected), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LaterCheck:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LaterCheck, self._arguments


def _short(digits: str) -> str:
    return digits if len(digits) <= 12 else f"{digits[:12]}..."
