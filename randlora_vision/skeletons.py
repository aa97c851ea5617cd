"""Models without memory for their weights, and without random numbers that the weights of a file replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_T = TypeVar("_T")

_FILLS = {name for name in dir(nn.init) if name.endswith("_")} | {"erfinv_", "clamp_", "fill_", "zero_", "mul_", "add_"}
_DRAWS = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "erfinv_"}


@contextmanager
def shapes_only() -> Iterator[None]:
    """Create tensors on the meta device, and leave out what would fill them: it takes most of the time of a model."""
    with torch.device("meta"), _WithoutValues():
        yield


def skeleton(build: Callable[[], _T]) -> _T:
    """Return what `build` makes with `shapes_only`, or with memory, where its constructor needs the values of tensors.

    RegNet of older timm is one: it counts the different widths of its stages in a tensor.
    """
    try:
        with shapes_only():
            return build()
    except Exception as error:  # from any library
        if "meta tensor" not in str(error).lower():
            raise
    with without_draws():
        return build()


class _WithoutValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextmanager
def without_draws() -> Iterator[None]:
    """Fill weights that start as random numbers with NaN instead: drawing takes most of the time of loading a model."""
    with _WithoutDraws():
        yield


class _WithoutDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).fill_(math.nan)
        return func(*args, **kwargs)
