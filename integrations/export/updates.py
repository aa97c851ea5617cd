"""The updates that adapters add to the weights of a model or pipeline, layer by layer, in a form for exports.

Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_vision.injection.record import ModelRecord, records, unwrap
from randlora_vision.injection.trained_in_full import current_saved
from randlora_vision.integrations.pipelines import components as _components
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules
from randlora_vision.layers.peft_around import plain_name
from randlora_vision.layers.state import ParameterState
from randlora_vision.layers.torch_around import is_sharded


class Update(NamedTuple):
    """One adapted parameter."""

    component: str  # name of the pipeline's component; "" for a bare model
    path: str  # path of the module in its component
    param: str  # name of the module's adapted parameter
    module: AdaptedModule  # the module
    adapters: tuple[str, ...]  # names of the adapters whose updates are summed

    @property
    def name(self) -> str:
        """Path of the parameter, prefixed with the name of the component."""
        return ".".join(part for part in (self.component, self.path, self.param) if part)

    @property
    def state(self) -> ParameterState:
        """The adapters of the parameter."""
        state = self.module.adapter_state(self.param)
        assert state is not None
        return state

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the sum of the updates at their current scale, in the shape of the weight, at least in float32."""
        state = self.state
        base = self.module.base_weight(self.param)
        shape: tuple[int, ...] = tuple(base.shape)
        if math.prod(shape) != state.out_features * state.in_features:  # packed
            shape = (state.out_features, state.in_features)
        dtype = torch.promote_types(base.dtype, torch.float32) if base.is_floating_point() else torch.float32
        # The weight of an offloaded layer has no values here, but its adapters may.
        tensors = [tensor for name in self.adapters for tensor in self.module.adapter_tensors(self.param, name)]
        if any(tensor.is_meta or is_sharded(tensor) for tensor in tensors):
            raise ValueError(
                f"the adapters of {self.name} are offloaded, sharded or on the meta device: export before that"
            )
        zeros = torch.zeros(shape, dtype=dtype, device=tensors[0].device)
        return self.module.add_updates(self.param, zeros, list(self.adapters))


def components(host: Any) -> dict[str, nn.Module]:
    """Return the modules of a diffusers pipeline by name; a bare model has the name ""."""
    return {"": unwrap(host)} if isinstance(host, nn.Module) else _components.components(host)


def updates(host: Any, adapter_name: str | None) -> list[Update]:
    """Return the adapted parameters of an adapter, or (None) of all in effect; raise ValueError if there are none."""
    found = []
    for component, prefix, root, record in _roots(host):
        names = in_force(record) if adapter_name is None else (adapter_name,)
        for path, module, param, state in adapted_modules(root):
            own = tuple(name for name in names if name in state.slots)
            if own:
                plain = plain_name(f"{prefix}.{path}.").strip(".")
                found.append(Update(component, plain, param, module, own))
    if not found:
        known = sorted({name for *_, record in _roots(host) for name in record.adapters})
        which = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        have = f"it has: {', '.join(known)}" if known else "it has no adapters at all"
        raise ValueError(f"this {type(host).__name__} has no {which}; {have}")
    return found


def trained_in_full(host: Any, adapter_name: str | None) -> dict[tuple[str, str], Tensor]:
    """Return (component, path) -> tensor for the modules that the adapters train in full (`modules_to_save`)."""
    found: dict[tuple[str, str], Tensor] = {}
    for component, prefix, root, record in _roots(host):
        names = in_force(record) if adapter_name is None else (adapter_name,)
        for name in names:
            if name in record.adapters:
                saved = current_saved(root, record, name)
                found.update({(component, f"{prefix}.{path}".strip(".")): tensor for path, tensor in saved.items()})
    return found


def in_force(record: ModelRecord) -> tuple[str, ...]:
    """Return the names of the merged and active adapters."""
    return tuple(dict.fromkeys((*record.switches.merged, *record.switches.active)))


def _roots(host: Any) -> Iterator[tuple[str, str, nn.Module, ModelRecord]]:
    for component, model in components(host).items():
        if any(isinstance(module, AdaptedModule) for module in model.modules()):
            for path, root, record in records(model):
                yield component, path, root, record
