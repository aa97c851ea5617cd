"""What may happen to the parameters of an adapted layer after the injection, and what a layer does then.

A host may assign another base weight, delete it, or give values to a layer that had none.

Shapes: O out, I in, R rank, N bases, m narrow side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from randlora_vision.layers.state import ParameterState
from randlora_vision.layers.torch_around import is_packed, is_sharded, is_sharder, replaced_message
from randlora_vision.names import PARTS, is_adapter_name, parameter_name

if TYPE_CHECKING:
    _Mixin = nn.Module
else:  # the adapted class inherits nn.Module from its own base
    _Mixin = object


class GuardedParameters(_Mixin):
    """The part of an adapted module that guards its parameters."""

    _randlora: dict[str, ParameterState]
    """Adapted parameter names and their adapters."""
    _randlora_quantized: bool

    def adapter_tensors(self, param: str, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Lambda (R, N) and gamma (N, m) of an adapter."""
        parked = self._randlora[param].parked
        if adapter_name in parked:
            return parked[adapter_name]
        lam, gamma = (self._tensor(parameter_name(param, part, adapter_name)) for part in PARTS)
        if lam is None or gamma is None:
            raise RuntimeError(
                f"lambda or gamma of adapter {adapter_name!r} on {param!r} was deleted from this {type(self).__name__} "
                "after inject: use delete_adapter or remove to delete an adapter"
            )
        return lam, gamma

    def park_merged(self) -> None:
        """Register lambda and gamma of exactly the adapters that are not merged.

        Those of merged adapters are kept in the state: to its readers, a merged module has its own parameters alone.
        """
        for param, state in self._randlora.items():
            for name in state.slots:
                tensors = self.adapter_tensors(param, name)
                names = [parameter_name(param, part, name) for part in PARTS]
                for registered in names:
                    self._parameters.pop(registered, None)
                if name in state.merged:
                    state.parked[name] = tensors
                else:
                    self._parameters.update(zip(names, tensors, strict=True))

    @contextlib.contextmanager
    def _all_registered(self) -> Iterator[None]:
        """Register the parked tensors within the context, so that nn.Module moves and converts them."""
        parked = [(param, state, name) for param, state in self._randlora.items() for name in state.parked]
        for param, state, name in parked:
            for part, tensor in zip(PARTS, state.parked[name], strict=True):
                self._parameters[parameter_name(param, part, name)] = tensor
        try:
            yield
        finally:
            for param, state, name in parked:
                lam, gamma = (self._parameters.pop(parameter_name(param, part, name)) for part in PARTS)
                assert lam is not None and gamma is not None
                state.parked[name] = lam, gamma

    def _tensor(self, name: str) -> Any:
        """A parameter of the module, or the tensor that FSDP has set in its place."""
        own = self._parameters.get(name)
        return self.__dict__.get(name) if own is None else own

    def _loaded_ahead(self) -> set[tuple[str, str]]:
        """(parameter, adapter) of every adapter that was loaded before the weight has values."""
        return {
            (param, name)
            for param, state in self._randlora.items()
            for name in state.slots
            if (base := self._tensor(param)) is not None and base.is_meta
            if not self.adapter_tensors(param, name)[0].is_meta
        }

    @torch.no_grad()
    def _restart(self, loaded: set[tuple[str, str]]) -> None:
        """Give the adapters their start values after ``to_empty`` has set none; those of `loaded` keep theirs."""
        for param, state in self._randlora.items():
            for name, slot in state.slots.items():
                for tensor, value in zip(self.adapter_tensors(param, name), slot.start, strict=True):
                    if not tensor.is_meta and (param, name) not in loaded:
                        tensor.fill_(value)

    def _materialize(self) -> None:
        """Create adapters that are on the meta device, with their start values, if the weight has left it."""
        for param, state in self._randlora.items():
            base = self._tensor(param)
            for name, slot in state.slots.items():
                tensors = self.adapter_tensors(param, name)
                if base is None or base.is_meta or not tensors[0].is_meta:
                    continue
                for old, value in zip(tensors, slot.start, strict=True):
                    new = nn.Parameter(torch.full_like(old, value, device=base.device), old.requires_grad)
                    torch.utils.swap_tensors(old, new)  # tied layers and optimisers hold the same object

    def __setattr__(self, name: str, value: Any) -> None:
        plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        if plain and name in self._randlora and not is_sharder():
            raise RuntimeError(
                f"{name!r} of an adapted {type(self).__name__} cannot be set to a plain tensor, such as the weight "
                "that another adapted layer computes: tie or change weights before inject, or pass a Parameter (the "
                "frozen one of an adapted layer is layer.base_weight())"
            )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module, but a new base weight must fit the adapters, and lambda and gamma stay in float32."""
        state, old = self._randlora.get(name), self._parameters.get(name)
        if (state is not None or (old is not None and is_adapter_name(name))) and not is_sharder():
            if param is None:
                raise RuntimeError(replaced_message(type(self).__name__, name))
            if state is not None:
                self._check_base(name, state, param)
            elif old is not None:
                param = self._as_master(name, old, param)
        super().register_parameter(name, param)

    def _as_master(self, name: str, old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
        """`new` in the place of lambda or gamma, at least in float32."""
        if new.shape != old.shape:
            raise RuntimeError(
                f"{name!r} of an adapted {type(self).__name__} has shape {tuple(old.shape)} and was assigned a tensor "
                f"of shape {tuple(new.shape)}: delete the adapter and inject another one"
            )
        return nn.Parameter(new.float(), new.requires_grad) if new.dtype.itemsize < old.dtype.itemsize else new

    def _check_base(self, name: str, state: ParameterState, new: nn.Parameter) -> None:
        """Raise RuntimeError unless `new` can take the place of an adapted parameter."""
        if is_sharded(new):
            return
        what = f"{name!r} of an adapted {type(self).__name__}"
        if state.merged:
            raise RuntimeError(
                f"{what} was assigned while {', '.join(state.merged)} is merged into it: unmerge would undo the "
                "assignment; unmerge, or merge and remove, first"
            )
        if is_packed(new) != self._randlora_quantized:
            raise RuntimeError(f"{what} was quantised or dequantised after inject: quantise before inject")
        if not self._randlora_quantized and new.numel() != state.out_features * state.in_features:
            raise RuntimeError(
                f"{what} was assigned a tensor of shape {tuple(new.shape)}, which does not fit its adapters of "
                f"{state.out_features} x {state.in_features}: change layers before inject, or remove the adapters first"
            )

    def __delattr__(self, name: str) -> None:
        if name in self._randlora or (is_adapter_name(name) and name in self._parameters):
            if not is_sharder():
                raise RuntimeError(replaced_message(type(self).__name__, name))
            if name not in self._parameters:  # nn.Module would look for the property
                del self.__dict__[name]
                return
        super().__delattr__(name)
