"""What diffusers passes with a call of an adapted model, and what it changed in the model since the last call.

diffusers scales its own LoRA for one call: by ``scale`` in the attention keyword arguments of a denoiser, and by the
``lora_scale`` with which a pipeline encodes its prompts. Both hold for adapters too.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from randlora_vision.injection.changes import refuse_changes
from randlora_vision.injection.record import ModelRecord, own_record
from randlora_vision.layers.adapted import AdaptedModule
from randlora_vision.layers.readers import module_of
from randlora_vision.torch_internals import remove_hooks

_HOSTS = (("diffusers.models.modeling_utils", "ModelMixin"), ("transformers.modeling_utils", "PreTrainedModel"))
_ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def watch_calls(model: nn.Module) -> None:
    """Register hooks on an adapted model of diffusers or transformers; other models are left alone."""
    if any(isinstance(model, getattr(sys.modules.get(module), name, ())) for module, name in _HOSTS):
        model.register_forward_pre_hook(_before_call, with_kwargs=True)
        model.register_forward_hook(_after_call, always_call=True)


def unwatch_calls(model: nn.Module) -> None:
    """Remove the hooks of `watch_calls`."""
    remove_hooks(model, _before_call, _after_call)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of the adapted modules of a model and the processors of its attentions, which hosts exchange."""

    acting: tuple[tuple[str, int], ...]
    """The adapters that act beside the weights, with the identities of their records."""
    places: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]
    """(children of a module, name, child), for every module that is adapted or contains such a module."""
    processors: tuple[tuple[nn.Module, type], ...]

    def holds(self, record: ModelRecord) -> bool:
        """True if nothing has changed. Takes a fraction of a millisecond for a large model."""
        return (
            self.acting == _acting(record)
            and all(children.get(name) is child for children, name, child in self.places)
            and all(type(getattr(module, "processor", None)) is kind for module, kind in self.processors)
        )


def _before_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record = own_record(model)
    assert record is not None
    compiling = torch.compiler.is_compiling()
    if not compiling and not (isinstance(record.layout, Layout) and record.layout.holds(record)):
        refuse_changes(model, record, [name for name, _ in _acting(record)])
        record.layout = _layout(model, record)
    scale = _attention_scale(kwargs)
    if scale is None and not compiling:
        scale = _prompt_scale()
    _set_scale(model, record, 1.0 if scale is None else scale)


def _after_call(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    record = own_record(model)
    assert record is not None
    if record.switches.call_scale != 1.0:
        record.switches.call_scale = 1.0


def _set_scale(model: nn.Module, record: ModelRecord, scale: Any) -> None:
    if record.switches.call_scale == scale:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"the scale in the attention keyword arguments must be a finite number, got {scale!r}")
    if scale != 1.0:
        # Activations that the backward pass recomputes would be computed after the call, without its scale.
        if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"scale={scale} for one call cannot be used with gradient checkpointing: call "
                "randlora_vision.set_scale(model, scale) instead"
            )
        if record.switches.merged:
            names = ", ".join(record.switches.merged)
            warnings.warn(f"scale={scale} has no effect on the merged adapters {names}: unmerge them", stacklevel=3)
    record.switches.call_scale = float(scale)


def _attention_scale(kwargs: Mapping[str, Any]) -> Any:
    for name in _ATTENTION_KWARGS:
        passed = kwargs.get(name)
        if isinstance(passed, dict) and "scale" in passed:
            return passed["scale"]
    return None


def _prompt_scale() -> Any:
    """The ``lora_scale`` of the ``encode_prompt`` of diffusers that makes this call, or None."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code, is_diffusers = frame.f_code, module_of(frame).startswith("diffusers.")
        if is_diffusers and "encode_prompt" in code.co_name and "lora_scale" in code.co_varnames:
            return frame.f_locals["lora_scale"]
        frame = frame.f_back
    return None


def _layout(model: nn.Module, record: ModelRecord) -> Layout:
    places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def visit(module: nn.Module) -> bool:
        within = [(name, child) for name, child in module._modules.items() if child is not None and visit(child)]
        places.extend((module._modules, name, child) for name, child in within)
        return bool(within) or isinstance(module, AdaptedModule)

    visit(model)
    processors = tuple((m, type(m.processor)) for m in model.modules() if hasattr(m, "processor"))
    return Layout(_acting(record), tuple(places), processors)


def _acting(record: ModelRecord) -> tuple[tuple[str, int], ...]:
    # Merged weights are right wherever a host copies them.
    switches = record.switches
    return tuple((name, id(record.adapters[name])) for name in switches.active if name not in switches.merged)
