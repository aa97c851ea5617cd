"""Support for PEFT layers that wrap adapted layers: plain names, and weight reads by PEFT.

PEFT's LoRA, which diffusers' ``load_lora_weights`` injects, renames ``to_q`` to ``to_q.base_layer``. Targets keep
their plain names, whether they were wrapped before or after.

A property can tell its readers apart only by the calling code, so the call stack is inspected:

- PEFT's layers around an adapted one write their own merges to ``weight.data``. The effective weight is a temporary
  tensor, in which the write would be lost, so PEFT gets the base's Parameter, and both adapters apply.
- ``fuse_projections`` of diffusers copies query, key and value permanently, after which neither the layers nor their
  adapters are used again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

# These properties of a PEFT layer forward to the wrapped layer, so the actual reader is PEFT's caller.
_FORWARDED = ("weight", "bias")


def peft_reader() -> str | None:
    """The name of the PEFT function that reads a weight, two calls up, or None if the reader is not in PEFT.

    Such a function must get the Parameter itself.

    Raises:
        RuntimeError: If the reader copies the weight permanently.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _in_peft(frame) and frame.f_code.co_name in _FORWARDED:
        frame = frame.f_back
    if frame is None:
        return None
    if frame.f_code.co_name == "fuse_projections":
        raise RuntimeError(
            "fuse_qkv_projections copies adapted weights into new layers, where the adapters can be neither trained "
            "nor removed: fuse before adding the adapters, or merge and remove them first"
        )
    return frame.f_code.co_name if _in_peft(frame) else None


def _in_peft(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("peft.")


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""The only child of a wrapper: of FSDP 1, of checkpointed activations and of `torch.compile`."""


def inside(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of PyTorch."""
    while True:
        inner = next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)
        if inner is None:
            return model
        model = inner


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) as `named_modules(remove_duplicate=False)`, without wrappers and PEFT's layers."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    model = inside(model)
    while loaded is not None and isinstance(model, loaded.BaseTunerLayer) and hasattr(model, "base_layer"):
        model = inside(model.base_layer)
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{path}.{name}" if path else name)


def plain_name(path: str) -> str:
    """The path that a parameter has without wrappers."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", *_WRAPPERS))
