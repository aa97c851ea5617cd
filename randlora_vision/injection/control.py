"""Adapters at run time: which are active, at what scale, and how many parameters they train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from randlora_vision.injection.held import refuse_offloaded_tensors
from randlora_vision.injection.offloaded import offloaded_modules
from randlora_vision.injection.record import check_names, count_base, records, refuse_merged, unwrap
from randlora_vision.injection.trained_in_full import install_saved
from randlora_vision.layers.adapted import adapted_modules
from randlora_vision.layers.peft_around import plain_name
from randlora_vision.layers.state import AdapterSlot


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, Parameter) of every lambda and gamma once, for all adapters unless one is named.

    Raises:
        ValueError: If the model has no such adapter, or its tensors have been offloaded since it was added.
    """
    model = unwrap(model)
    wanted = check_names(model, adapter_name)
    offloaded = offloaded_modules(model)
    seen: set[int] = set()
    for path, module, param, state in adapted_modules(model):
        for name in state.slots:
            if name not in wanted:
                continue
            tensors = module.adapter_tensors(param, name)
            if module in offloaded and tensors[0].is_meta:
                raise ValueError(
                    f"lambda and gamma of {path!r} are offloaded (accelerate's cpu_offload, disk_offload or "
                    "dispatch_model) and cannot be trained or changed: add adapters after offloading, or remove its "
                    "hooks first (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
                )
            for part, tensor in zip(("lambda", "gamma"), tensors, strict=True):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{param}.{name}.{part}".lstrip("."), tensor


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of parameters that require a gradient, number of parameters without the adapters)."""
    model = unwrap(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, count_base(model)


def set_active(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...]) -> None:
    """Make exactly these adapters active; their updates add up.

    All other adapters have no effect and require no gradients. If several adapters train the same module in full, the
    module of the last named one is used.

    Raises:
        ValueError: If the model has no such adapter, or modules trained in full are offloaded.
    """
    model = unwrap(model)
    wanted = check_names(model, () if not adapter_names else adapter_names)
    for _, root, record in records(model):
        refuse_offloaded_tensors(root, record.installed, "switch modules that are trained in full")
    before = {name for _, _, record in records(model) for name in record.switches.active}
    for _, root, record in records(model):
        record.switches.active = tuple(name for name in wanted if name in record.adapters)
        install_saved(root, record)
    for _, module, param, state in adapted_modules(model):
        for name in before.union(wanted) & state.slots.keys():  # not all adapters: there may be a thousand
            for tensor in module.adapter_tensors(param, name):
                tensor.requires_grad_(state.slots[name].trainable and name in wanted)


def set_scale(model: nn.Module, scale: float | Mapping[str, float], adapter_name: str | None = None) -> None:
    """Multiply an adapter's update (or all adapters' updates) by `scale`; 1 is as trained, 0 is off.

    Args:
        model: The adapted model.
        scale: A number, or one number per part: ``{"down_blocks": 0.5, "down_blocks.1": 0}``. A part is a prefix of
            target names, in whole components. The longest matching part wins, and targets without one keep their
            scale.
        adapter_name: The adapter to scale; None means all.

    Raises:
        ValueError: If `scale` is not a finite number, there is no such adapter or part, or the adapter is merged.
    """
    for slot, value in scale_changes(model, scale, adapter_name):
        slot.scale = value


def scale_changes(
    model: nn.Module, scale: float | Mapping[str, float], adapter_name: str | None
) -> list[tuple[AdapterSlot, float]]:
    """The adapter slots that `set_scale` would change, and their new scales."""
    for value in scale.values() if isinstance(scale, Mapping) else (scale,):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"scale must be a finite number, got {value!r}: set_scale(model, scale, adapter_name)")
    model = unwrap(model)
    wanted = check_names(model, adapter_name)
    for _, _, record in records(model):
        refuse_merged(record, wanted)
    slots = [
        (plain_name(f"{path}.{param}".lstrip(".")), state.slots[name])
        for path, _, param, state in adapted_modules(model)
        for name in wanted
        if name in state.slots
    ]
    if not isinstance(scale, Mapping):
        return [(slot, float(scale)) for _, slot in slots]
    for part in scale:
        if not any(f"{target}.".startswith(f"{part}.") for target, _ in slots):
            tops = dict.fromkeys(target.partition(".")[0] for target, _ in slots)
            raise ValueError(f"scale: no adapted weight is in {part!r}; the model's parts are: {', '.join(tops)}, ...")
    # The longest part comes last, so it wins.
    return [
        (slot, float(scale[part]))
        for part in sorted(scale, key=len)
        for target, slot in slots
        if f"{target}.".startswith(f"{part}.")
    ]
