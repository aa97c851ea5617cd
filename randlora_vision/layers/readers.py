"""Who reads a state dict: libraries that save a model whole, and those that copy parts of it into another model.

With attached adapters, a state dict holds the base's weights under their own names, and lambda and gamma beside them. A
training checkpoint needs exactly that. Other readers would silently end up with the base model, and only the calling
code tells them apart, so the call stack is inspected.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_SAVERS = {
    "accelerate": ("save_model",),
    "diffusers": ("save_pretrained",),
    "huggingface_hub": ("save_pretrained", "save_torch_model"),
    "open_clip": ("save_for_hf",),
    "safetensors": ("save_model",),
    "timm": ("save_for_hf",),
    "transformers": ("save_pretrained",),
}
"""Functions of a library that write a model which is loaded without adapters."""


def refuse_copy() -> None:
    """Raise RuntimeError if diffusers makes another model from an adapted one: ``ControlNetModel.from_unet``."""
    name = _copier()
    if name is not None:
        raise RuntimeError(
            f"{name} copies the weights of an adapted model without its adapters: to copy the adapted weights, merge "
            "the adapters first (randlora_vision.merge); to copy those of the base, call it within "
            "randlora_vision.disabled(model)"
        )


def is_copied() -> bool:
    """True if diffusers makes another model from the one whose state dict is read."""
    return _copier() is not None


def warn_saver(adapter_names: list[str]) -> None:
    """Warn, at the place in the user's code, if a library saves a model with these adapters in its own format."""
    host, level, stack_level = "", 0, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        level += 1
        package = _package(frame)
        if frame.f_code.co_name in _SAVERS.get(package, ()):
            host, stack_level = f"{frame.f_code.co_name} of {package}", level + 1
        frame = frame.f_back
    if host:
        warnings.warn(
            f"{host} writes the adapters {', '.join(adapter_names)} beside the weights of the base, and what loads the "
            "file leaves them out: save the adapters with save_adapter, or save a merged model (merge, or save_merged "
            "of the integration)",
            stacklevel=stack_level,
        )


def _copier() -> str | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _package(frame) in ("torch", "randlora_vision"):
        frame = frame.f_back
    if frame is not None and _package(frame) == "diffusers" and frame.f_code.co_name.startswith("from_"):
        owner = frame.f_locals.get("cls")
        return f"{owner.__name__}.{frame.f_code.co_name}" if isinstance(owner, type) else frame.f_code.co_name
    return None


def module_of(frame: FrameType) -> str:
    """The name of the module whose code runs in a frame; empty if it has none."""
    return str(frame.f_globals.get("__name__", ""))


def _package(frame: FrameType) -> str:
    return module_of(frame).partition(".")[0]
