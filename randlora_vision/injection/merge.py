"""Merging adapters into the weights, unmerging them bit for bit, and disabling them temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from randlora_vision.injection.changes import refuse_changes
from randlora_vision.injection.held import refuse_held_weights, refuse_offloaded_tensors
from randlora_vision.injection.record import ModelRecord, check_names, own_record, records, refuse_in_block, unwrap
from randlora_vision.injection.trained_in_full import install_saved
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules
from randlora_vision.layers.parametrised import set_computed
from randlora_vision.layers.state import ParameterState


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make the model behave as the base model inside the context.

    No adapter has any effect, not even a merged one, and modules trained in full are the base's.

    Raises:
        ValueError: If adapters are merged into weights that a host keeps elsewhere (see `merge`).
    """
    model = unwrap(model)
    before = [(root, record, record.switches.enabled, record.switches.merged) for _, root, record in records(model)]
    for root, record, _, merged in before:
        refuse_offloaded_tensors(root, record.installed, "disable adapters with modules trained in full")
        if merged:
            refuse_held_weights(root, "disable merged adapters")
    try:
        for root, record, _, _ in before:
            _set_merged(root, record, (), safe=False)
            _set_enabled(root, record, False)
        yield
    finally:
        for root, record, enabled, merged in before:
            if own_record(root) is record:  # not removed within the context
                _set_enabled(root, record, enabled)
                _set_merged(root, record, tuple(name for name in merged if name in record.adapters), safe=False)


def merge(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...] | None = None, safe: bool = True) -> None:
    """Merge adapters into the weights: inference costs nothing extra, and `state_dict` is that of a plain model.

    The merged weight is a new Parameter, and the base's own is kept beside it so that `unmerge` is bit-exact. Until
    then, adapted weights take twice the memory (`remove` frees it and keeps the merged weights), and lambda and gamma
    are not among the model's parameters.

    Args:
        model: The adapted model.
        adapter_names: The adapters to merge, at their current scale; None means all active ones.
        safe: If True, refuse to merge if any result is not finite.

    Raises:
        ValueError: If there is no such adapter, a weight is packed (quantised), a host keeps the weights elsewhere
            (offloaded by accelerate or diffusers, sharded by FSDP or DeepSpeed, on the meta device, in float8), an
            adapted weight was replaced since the injection, or a merged weight is not finite. The model is then left
            unchanged.
    """
    model = unwrap(model)
    wanted = None if adapter_names is None else check_names(model, adapter_names)
    for _, root, record in records(model):
        names = record.switches.active if wanted is None else [name for name in wanted if name in record.adapters]
        _set_merged(root, record, tuple(dict.fromkeys((*record.switches.merged, *names))), safe)


def unmerge(model: nn.Module, adapter_names: str | list[str] | tuple[str, ...] | None = None) -> None:
    """Unmerge adapters (all unless some are named), restoring the weights bit for bit.

    Raises:
        ValueError: If there is no such adapter, a host keeps the weights elsewhere, or an adapted weight was replaced
            since the injection.
    """
    model = unwrap(model)
    wanted = check_names(model, adapter_names)
    for _, root, record in records(model):
        _set_merged(root, record, tuple(name for name in record.switches.merged if name not in wanted), safe=False)


def _set_enabled(root: nn.Module, record: ModelRecord, enabled: bool) -> None:
    record.switches.enabled = enabled
    install_saved(root, record)


def _set_merged(root: nn.Module, record: ModelRecord, names: tuple[str, ...], safe: bool) -> None:
    """Make exactly the named adapters merged: compute all weights first, then assign them."""
    if names == record.switches.merged:
        return
    refuse_in_block(record, "merge or unmerge adapters")
    refuse_held_weights(root, "merge or unmerge adapters", unmerging=set(names) < set(record.switches.merged))
    refuse_changes(root, record, set(names) ^ set(record.switches.merged))
    weights: dict[int, nn.Parameter | None] = {}
    holders = list(adapted_modules(root))
    for path, module, param, state in holders:
        if state.written:
            _take_over(path, module, param, state)
        if id(state) not in weights:
            weights[id(state)] = _merged_weight(f"{path}.{param}".lstrip("."), module, param, state, names, safe)
    for _, module, param, state in holders:
        merged = tuple(name for name in names if name in state.slots)
        if merged and not state.merged:
            state.original = module._parameters.get(param)
        weight = weights[id(state)]
        if parametrize.is_parametrized(module, param):
            set_computed(module, param, state, weight)
        else:
            module._parameters[param] = weight
    record.switches.merged = names
    for _, module, _, _ in holders:
        module.park_merged()
    for _, _, _, state in holders:
        state.parked = {name: tensors for name, tensors in state.parked.items() if name in names}
        if not state.merged:
            state.original = None
    install_saved(root, record)


@torch.no_grad()
def _take_over(path: str, module: AdaptedModule, param: str, state: ParameterState) -> None:
    """Add to the base's Parameter what PEFT wrote to the merged one: the difference from a fresh merge."""
    merged, original = module._parameters[param], state.original
    assert merged is not None
    if original is None:
        raise ValueError(f"PEFT merged into {path}, which a parametrization computes, and this cannot be undone")
    fresh = _merged_weight(path, module, param, state, state.merged, safe=False)
    if not torch.equal(merged, fresh):  # type: ignore[arg-type]
        original.add_((merged.float() - fresh.float()).to(original.dtype))  # type: ignore[union-attr]
    state.written = False


@torch.inference_mode(False)  # a weight made in inference mode could not be trained with afterwards
@torch.no_grad()
def _merged_weight(
    path: str, module: AdaptedModule, param: str, state: ParameterState, names: tuple[str, ...], safe: bool
) -> nn.Parameter | None:
    """The base's weight with the named adapters added, at least in float32; the base's own if there are none.

    None stands for a base's own weight that a parametrization computes.
    """
    if module.has_packed_weight:
        raise ValueError(f"{path} is quantised: its packed weight cannot take an update; dequantise the base to merge")
    own = [name for name in names if name in state.slots]
    base = module.frozen_weight(param)
    if not own:
        return base if isinstance(base, nn.Parameter) else None
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    merged = module.add_updates(param, exact, own).to(base.dtype).contiguous()
    if safe and not torch.isfinite(merged).all():
        raise ValueError(f"merging {', '.join(own)} into {path} gives non-finite numbers: the adapter is broken")
    return nn.Parameter(merged, requires_grad=base.requires_grad)
