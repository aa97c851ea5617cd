"""Models without memory for their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = {name for name in dir(nn.init) if name.endswith("_")} | {"erfinv_", "clamp_", "fill_", "zero_", "mul_", "add_"}


@contextmanager
def shapes_only() -> Iterator[None]:
    """Create tensors on the meta device, and leave out what would fill them: it takes most of the time of a model."""
    with torch.device("meta"), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)
