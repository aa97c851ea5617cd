"""PEFT's layers around adapted ones: plain names through them, and reads of a weight that come from them.

PEFT's LoRA, which diffusers' ``load_lora_weights`` injects, renames ``to_q`` to ``to_q.base_layer``. Targets keep
their plain names whatever was wrapped before or is wrapped after.

A property cannot tell who reads it by anything but the code that asks, so that is looked at:

- PEFT's layers around an adapted one write their own merges to ``weight.data``. The effective weight is a temporary,
  in which the write would be lost; they get the base's Parameter, and both adapters act.
- ``fuse_projections`` of diffusers copies query, key and value for good, after which neither the layers nor their
  adapters are ever run again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

# The `weight` of a PEFT layer hands on to the layer inside: the reader is who asked PEFT.
_HANDS_ON = ("weight", "bias")


def peft_reader() -> str | None:
    """The name of PEFT's function that reads a weight, two calls up, if it is PEFT's: it must get the Parameter itself.

    Raises:
        RuntimeError: If the reader copies the weight for good.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _in_peft(frame) and frame.f_code.co_name in _HANDS_ON:
        frame = frame.f_back
    if frame is None:
        return None
    if frame.f_code.co_name == "fuse_projections":
        raise RuntimeError(
            "fuse_qkv_projections copies adapted weights into new layers, where the adapters would neither train nor "
            "leave again: fuse before the adapters are added, or merge and remove them first"
        )
    return frame.f_code.co_name if _in_peft(frame) else None


def _in_peft(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("peft.")


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as `named_modules(remove_duplicate=False)` gives them, without PEFT's layers and their parts."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    while loaded is not None and isinstance(model, loaded.BaseTunerLayer) and hasattr(model, "base_layer"):
        model = model.base_layer
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{path}.{name}" if path else name)


def plain_name(path: str) -> str:
    """The path that a parameter has where PEFT wraps nothing."""
    return path.replace(".base_layer.", ".")
