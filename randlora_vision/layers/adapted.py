"""The mixin of all adapted modules: effective weights, copies and state dicts.

Lambda and gamma are registered on the module itself, beside its own parameters.

Shapes: see `randlora_vision.compute.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.bases.products import Term
from randlora_vision.compute.cache import current_cache
from randlora_vision.compute.functional import effective_weight, randlora_linear
from randlora_vision.compute.planner import PINNED
from randlora_vision.compute.recompute import Recipe, current_scope
from randlora_vision.layers import readers
from randlora_vision.layers.guarded import GuardedParameters
from randlora_vision.layers.mixed import unknown_weight
from randlora_vision.layers.parametrised import computed_without_merging
from randlora_vision.layers.state import ParameterState
from randlora_vision.layers.torch_around import is_packed, is_sharded
from randlora_vision.names import NAME, PARTS, is_adapter_name, parameter_name
from randlora_vision.torch_internals import makes_empty

ATTENTION_PARAMETERS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class AdaptedModule(GuardedParameters):
    """The mixin that every adapted module inherits from, in addition to its original class."""

    _randlora_base: type[nn.Module]
    """The class before the swap."""
    _randlora_on_base = False
    """True while the attributes are the base's Parameters, for PEFT to write to."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain module: hosts make layers like this one with ``type(layer)(...)``, as PEFT's LoRA does.

        Without arguments, an empty instance, which hosts that copy layers ask for.
        """
        return cls._randlora_base(*args, **kwargs) if args or kwargs else object.__new__(cls)

    @property
    def has_packed_weight(self) -> bool:
        """True for a quantised linear layer: adapters act as a branch beside its packed weight."""
        return self._randlora_quantized

    def adapter_state(self, param: str) -> ParameterState | None:
        """The adapters of a parameter, or None if it has none."""
        return self._randlora.get(param)

    def add_updates(self, param: str, weight: Tensor, names: list[str]) -> Tensor:
        """`weight` plus the updates of the named adapters, in the shape in which the module stores `param`."""
        terms = self._terms(param, names, weight.dtype, torch.compiler.is_dynamo_compiling())
        return _updated(self._randlora[param], weight, terms)

    def base_weight(self, param: str = "weight") -> Tensor:
        """The frozen parameter itself; attribute access gives the effective weight instead."""
        own = self._tensor(param)
        if own is not None:
            return own
        computed = getattr(self._randlora_base, param, None)  # torch.nn.utils.parametrize made it a property
        if not isinstance(computed, property) or computed.fget is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {param!r}")
        return computed.fget(self)

    def frozen_weight(self, param: str) -> Tensor:
        """The weight without any adapter, not even a merged one: a Parameter unless a parametrization computes it."""
        state = self._randlora[param]
        if state.original is not None:
            return state.original
        return computed_without_merging(self, param, state) if state.merged else self.base_weight(param)

    def _terms(self, param: str, names: list[str], dtype: torch.dtype, compiling: bool) -> tuple[Term, ...]:
        """The named adapters' parts of the update, with products in `dtype`; `compiling` is True in torch.compile."""
        state = self._randlora[param]
        wide, call_scale = max(state.out_features, state.in_features), state.switches.call_scale
        terms, own = [], self._parameters
        for name in names:
            slot = state.slots[name]
            lam: Any = own.get(NAME.format(param, "lambda", name))  # where they are in every step of a training
            gamma: Any = own.get(NAME.format(param, "gamma", name))
            if lam is None or gamma is None:
                lam, gamma = self.adapter_tensors(param, name)
            if compiling:  # s as an input: a number would be a constant of the graph
                lam, factor = lam * slot.factor_input, call_scale
            else:
                factor = slot.own_factor if call_scale == 1.0 else slot.factor(call_scale)
            terms.append(slot.bases.term(lam, gamma, wide, factor, dtype))
        return tuple(terms)

    def _effective(self, param: str) -> Tensor:
        base, state = self.base_weight(param), self._randlora[param]
        if state.mixture is not None:
            return unknown_weight(state.mixture, self, param, base)
        # FSDP 2 and DeepSpeed read sharded parameters by attribute and must find their own objects.
        live = state.live()
        if not live or is_sharded(base) or (base.is_meta and not self.adapter_tensors(param, live[0])[0].is_meta):
            return base
        low = autocast_dtype(base)
        terms = self._terms(param, live, low or base.dtype, torch.compiler.is_dynamo_compiling())
        opened = current_scope()
        if opened is None or state.transposed:
            return _updated(state, base, terms)
        # Inside a scope the reader is a matrix product, for which autocast would round the weight anyway.
        recipe, cache = Recipe(base, terms, low or base.dtype), current_cache()
        kept = None if cache is None else cache.weight(recipe)
        return opened.weight((id(self), param), recipe) if kept is None else kept

    def _branch(self, x: Tensor, names: list[str], dtype: torch.dtype, drop: bool, compiling: bool) -> Tensor | None:
        """The named adapters' contribution to a linear layer's output (..., O), or None; `drop` applies dropout."""
        state, total = self._randlora["weight"], None
        for name in names:
            slot = state.slots[name]
            dropped = torch.dropout(x, slot.dropout, True) if drop else x
            terms, pinned = self._terms("weight", [name], dtype, compiling), PINNED[slot.compute]
            out = randlora_linear(dropped, None, None, terms, state.out_features, dtype, pinned, compiling)
            total = out if total is None else total + out
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in nn.Module, but lambda and gamma stay float32 when the model is converted to half precision."""
        masters: set[int] = set()
        for param, state in self._randlora.items():
            for name in state.slots:
                for tensor in self.adapter_tensors(param, name):
                    masters.update((id(tensor), id(tensor.grad)))
        masters.discard(id(None))
        loaded = self._loaded_ahead() if makes_empty(fn) else set()
        kept = {id(tensor) for param, name in loaded for tensor in self.adapter_tensors(param, name)}

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept:
                return result.copy_(tensor)
            if id(tensor) in masters and result.dtype.itemsize < torch.float32.itemsize:
                return tensor.to(result.device)
            return result

        for state in self._randlora.values():
            if state.kept is not None:
                state.kept = {name: fn(tensor) for name, tensor in state.kept.items()}
            if state.original is not None:
                moved = fn(state.original.detach())
                if moved.data_ptr() != state.original.data_ptr() or moved.dtype != state.original.dtype:
                    state.original = nn.Parameter(moved, requires_grad=False)
        with self._all_registered():
            super()._apply(keep_precision, recurse)
        if makes_empty(fn):
            self._restart(loaded)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As in nn.Module, but refuses or warns readers that would get the base model (see `readers`)."""
        live = list(dict.fromkeys(name for state in self._randlora.values() for name in state.live()))
        if live:
            readers.refuse_copy()
            if not any(path.endswith(tuple(f"_gamma_{name}" for name in live)) for path in destination):
                readers.warn_saver(live)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if readers.is_copied():
            for name in [name for name in self._parameters if is_adapter_name(name)]:
                del destination[prefix + name]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in nn.Module, without the parametrizations that merged weights hide."""
        found, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        hidden = [f"{prefix}parametrizations.{param}." for param, state in self._randlora.items() if state.is_folded]
        for key in [key for key in found if hidden and key.startswith(tuple(hidden))]:
            del found[key]
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in nn.Module, but a checkpoint of the base model, without lambda and gamma, counts as complete."""
        own = [
            prefix + parameter_name(param, part, name)
            for param, state in self._randlora.items()
            for name in state.slots
            for part in PARTS
        ]
        merged = sorted({name for state in self._randlora.values() for name in state.merged})
        # A state dict of other layers only, such as a LoRA that PEFT loads, changes nothing here.
        if merged and any(key in state_dict for key in (*own, *(prefix + param for param in self._randlora))):
            error_msgs.append(f"{prefix[:-1]}: {', '.join(merged)} merged into the weight; call unmerge first")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not any(key in state_dict for key in own):
            missing_keys[:] = [key for key in missing_keys if key not in own]
            self._materialize()

    def extra_repr(self) -> str:
        """The base class's text, followed by one entry per adapter."""
        parts = [super().extra_repr()]
        for param, state in self._randlora.items():
            for name, slot in state.slots.items():
                switches = state.switches
                note = " merged" if name in switches.merged else "" if name in switches.active else " inactive"
                parts.append(f"randlora[{param}]: {name} (rank={slot.rank}, alpha={slot.alpha:g}){note}")
        return ", ".join(part for part in parts if part)


def _updated(state: ParameterState, weight: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """The `effective_weight` of a parameter, in the orientation in which its module stores it."""
    return effective_weight(weight.t(), terms).t() if state.transposed else effective_weight(weight, terms)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule, str, ParameterState]]:
    """Yield (module path, module, parameter name, state) of every adapted parameter, once per tied owner."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            for param, state in module._randlora.items():
                yield path, module, param, state


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, without lambda and gamma, in a time that does not grow with the adapters.

    Adapters are registered after the parameters of their layer, so the first entries usually are all of them.
    """
    if not isinstance(module, AdaptedModule):
        return dict(module._parameters.items())  # TorchScript's are not a dict
    adapters = sum(len(state.slots) - len(state.parked) for state in module._randlora.values())
    count = len(module._parameters) - len(PARTS) * adapters
    found: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        if len(found) == count:
            break
        if not is_adapter_name(name):
            found[name] = parameter
    return found


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters()``, without lambda and gamma."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in own_parameters(module).items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


def is_quantized(module: nn.Module) -> bool:
    """True for a linear layer with a packed weight: integers, or a tensor subclass of a quantisation library."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and is_packed(weight)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs matrix products of `tensor`, or None without autocast."""
    device = tensor.device.type
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)
