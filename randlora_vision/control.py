"""Adapters at run time: which are active, how strongly, merged into the weights or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from randlora_vision.layers import AdaptedModule, ParameterState, Slot, adapted_modules, updated_weight
from randlora_vision.record import ModelRecord, check_names, count_base, install_saved, records, unwrap
from randlora_vision.wrapping import plain_name


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, Parameter) of every lambda and gamma, each once; of all adapters unless one is named.

    Raises:
        ValueError: If the model has no such adapter.
    """
    model = unwrap(model)
    wanted = check_names(model, adapter_name)
    seen: set[int] = set()
    for path, module, param, state in adapted_modules(model):
        for name in state.slots:
            if name not in wanted:
                continue
            for part, tensor in zip(("lambda", "gamma"), module.adapter_tensors(param, name), strict=True):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{param}.{name}.{part}".lstrip("."), tensor


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(numbers that require a gradient, numbers of the model without its adapters)."""
    model = unwrap(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, count_base(model)


def set_active(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...]) -> None:
    """Make exactly these adapters active; their updates add up. Others neither act nor require gradients.

    Of modules trained in full by several adapters, the last named adapter's is in force.

    Raises:
        ValueError: If the model has no such adapter.
    """
    model = unwrap(model)
    wanted = check_names(model, () if not adapter_names else adapter_names)
    for _, root, record in records(model):
        record.active = tuple(name for name in wanted if name in record.adapters)
        install_saved(root, record)
    for _, module, param, state in adapted_modules(model):
        state.active = tuple(name for name in wanted if name in state.slots)
        for name, slot in state.slots.items():
            for tensor in module.adapter_tensors(param, name):
                tensor.requires_grad_(slot.trainable and name in wanted)


def set_scale(model: nn.Module, scale: float | Mapping[str, float], adapter_name: str | None = None) -> None:
    """Multiply an adapter's update (all adapters' unless one is named) by `scale`; 1 is as trained, 0 is off.

    Args:
        model: The adapted model.
        scale: A number, or numbers by part: ``{"down_blocks": 0.5, "down_blocks.1": 0}``. A part is the beginning of
            targets' names, in whole components; of several the longest holds, and targets in none keep their scale.
        adapter_name: Which adapter.

    Raises:
        ValueError: If `scale` is no finite number, there is no such adapter or part, or the adapter is merged.
    """
    for slot, value in scale_changes(model, scale, adapter_name):
        slot.scale = value


def scale_changes(
    model: nn.Module, scale: float | Mapping[str, float], adapter_name: str | None
) -> list[tuple[Slot, float]]:
    """What `set_scale` would set."""
    for value in scale.values() if isinstance(scale, Mapping) else (scale,):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"scale must be a finite number, got {value!r}: set_scale(model, scale, adapter_name)")
    model = unwrap(model)
    wanted = check_names(model, adapter_name)
    _refuse_merged(model, wanted)
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
    # The longest part comes last, and holds.
    return [
        (slot, float(scale[part]))
        for part in sorted(scale, key=len)
        for target, slot in slots
        if f"{target}.".startswith(f"{part}.")
    ]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make the model the base within the context.

    No adapter acts, not even a merged one, and modules trained in full are the base's.
    """
    model = unwrap(model)
    before = [(root, record, record.enabled, record.merged) for _, root, record in records(model)]
    for root, record, _, _ in before:
        _set_merged(root, record, (), safe=False)
        _set_enabled(root, record, False)
    try:
        yield
    finally:
        for root, record, enabled, merged in before:
            _set_enabled(root, record, enabled)
            _set_merged(root, record, merged, safe=False)


def merge(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...] | None = None, safe: bool = True) -> None:
    """Put adapters into the weights: no cost at inference, and `state_dict` holds the merged weights.

    The weight becomes a new Parameter and the base's own is kept beside it, so that `unmerge` is bit-exact: until
    then adapted weights take twice their memory (`remove` frees it and keeps the merged weights).

    Args:
        model: The adapted model.
        adapter_names: Which, at their present scale; None means all that are active.
        safe: Refuse to merge if any result is not finite.

    Raises:
        ValueError: If there is no such adapter, a weight is packed (quantised) or computed by a parametrization,
            or a merged weight is not finite. The model is untouched then.
    """
    model = unwrap(model)
    wanted = None if adapter_names is None else check_names(model, adapter_names)
    for _, root, record in records(model):
        names = record.active if wanted is None else [name for name in wanted if name in record.adapters]
        _set_merged(root, record, tuple(dict.fromkeys((*record.merged, *names))), safe)


def unmerge(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...] | None = None) -> None:
    """Take merged adapters (all unless some are named) out of the weights again, bit for bit.

    Raises:
        ValueError: If there is no such adapter.
    """
    model = unwrap(model)
    wanted = check_names(model, adapter_names)
    for _, root, record in records(model):
        _set_merged(root, record, tuple(name for name in record.merged if name not in wanted), safe=False)


def _set_enabled(root: nn.Module, record: ModelRecord, enabled: bool) -> None:
    record.enabled = enabled
    install_saved(root, record)
    for _, _, _, state in adapted_modules(root):
        state.enabled = enabled


def _set_merged(root: nn.Module, record: ModelRecord, names: tuple[str, ...], safe: bool) -> None:
    """Make exactly the named adapters merged: compute every weight first, then put them in place."""
    if names == record.merged:
        return
    weights: dict[int, nn.Parameter] = {}
    holders = list(adapted_modules(root))
    for path, module, param, state in holders:
        if state.written:
            _take_over(path, module, param, state)
        if id(state) not in weights:
            weights[id(state)] = _merged_weight(f"{path}.{param}".lstrip("."), module, param, state, names, safe)
    for _, module, param, state in holders:
        merged = tuple(name for name in names if name in state.slots)
        if merged and not state.merged:
            state.original = module._parameters[param]
        module._parameters[param] = weights[id(state)]
    for _, _, _, state in holders:
        state.merged = tuple(name for name in names if name in state.slots)
        if not state.merged:
            state.original = None
    record.merged = names
    install_saved(root, record)


@torch.no_grad()
def _take_over(path: str, module: AdaptedModule, param: str, state: ParameterState) -> None:
    """Give the base's Parameter what PEFT wrote to the merged one: all that differs from a fresh merge."""
    merged, original = module._parameters[param], state.original
    assert merged is not None and original is not None
    fresh = _merged_weight(path, module, param, state, state.merged, safe=False)
    if not torch.equal(merged, fresh):
        original.add_((merged.float() - fresh.float()).to(original.dtype))
    state.written = False


@torch.inference_mode(False)  # a weight made in inference mode could not be trained with afterwards
@torch.no_grad()
def _merged_weight(
    path: str, module: AdaptedModule, param: str, state: ParameterState, names: tuple[str, ...], safe: bool
) -> nn.Parameter:
    """The base's Parameter with the named adapters added, in float32 at least; itself for none."""
    if module._randlora_quantized:
        raise ValueError(f"{path} is quantised: its packed weight cannot take an update; dequantise the base to merge")
    if parametrize.is_parametrized(module, param):
        raise ValueError(f"{path} is computed by a parametrization: remove_parametrizations before inject to merge")
    base = state.original if state.original is not None else module._parameters[param]
    assert isinstance(base, nn.Parameter)
    own = [name for name in names if name in state.slots]
    if not own:
        return base
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    merged = updated_weight(state, exact, module._terms(param, own, exact.dtype)).to(base.dtype).contiguous()
    if safe and not merged.is_meta and not torch.isfinite(merged).all():
        raise ValueError(f"merging {', '.join(own)} into {path} gives non-finite numbers: the adapter is broken")
    return nn.Parameter(merged, requires_grad=base.requires_grad)


def _refuse_merged(model: nn.Module, names: tuple[str, ...]) -> None:
    for _, _, record in records(model):
        for name in names:
            if name in record.merged:
                raise ValueError(f"adapter {name!r} is merged into the weights: unmerge it first")
