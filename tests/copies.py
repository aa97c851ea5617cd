"""Copies of models and pipelines, in a fraction of the time that copy.deepcopy takes to walk through their modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def template(original: Any) -> Callable[[], Any]:
    """Return a function that makes copies of `original`, which must not change.

    The original is pickled once without its tensors, of which each copy gets its own. What cannot be pickled is copied
    by copy.deepcopy.
    """
    tensors: list[Tensor] = []
    written = io.BytesIO()
    try:
        _Writer(written, tensors).dump(original)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):  # the last one by parametrized modules
        return lambda: copy.deepcopy(original)
    return lambda: _Reader(written.getbuffer(), tensors).load()


class _Writer(pickle.Pickler):
    """Collects the tensors and writes their numbers."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors, self._numbers = tensors, dict[int, int]()

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._tensors)
            self._tensors.append(value)
        return self._numbers[id(value)]


class _Reader(pickle.Unpickler):
    """Puts a copy of each tensor where its number is; tied parameters stay tied."""

    def __init__(self, data: memoryview, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors, self._made = tensors, dict[int, Tensor]()

    def persistent_load(self, number: int) -> Tensor:
        if number not in self._made:
            tensor = self._tensors[number]
            own = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            self._made[number] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own
        return self._made[number]
