"""Merging into weights that `torch.nn.utils.parametrize` computes from other tensors, such as those of weight norm.

The merged weight is written into those tensors if the parametrization has an inverse that reproduces it (weight norm
has), so that the state dict keeps its keys. Otherwise a parameter of the weight's name hides the parametrization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randlora_vision.layers.state import ParameterState

_ROUNDING = 32
"""How many units of the largest number's rounding an inverse may be off."""


def computed_without_merging(module: nn.Module, param: str, state: ParameterState) -> Tensor:
    """What the parametrization of `param` computes without the merged adapters."""
    return functional_call(_parts(module, param), state.kept or {}, ())


@torch.inference_mode(False)
@torch.no_grad()
def set_computed(module: nn.Module, param: str, state: ParameterState, weight: nn.Parameter | None) -> None:
    """Make `param` the merged `weight`, or what it was before merging if that is None."""
    parts = _parts(module, param)
    module._parameters.pop(param, None)
    _restore(parts, state.kept)
    state.kept = None
    if weight is None:
        return
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(parts).items()}
    try:
        parts.right_inverse(weight.detach().clone())  # it may keep the memory
        off = (parts() - weight).abs().max()
    except (NotImplementedError, RuntimeError, ValueError):
        off = torch.tensor(torch.inf)
    if off <= _ROUNDING * torch.finfo(weight.dtype).eps * weight.abs().max():
        state.kept = kept
    else:
        _restore(parts, kept)
        module._parameters[param] = weight


def _parts(module: nn.Module, param: str) -> Any:
    return module.parametrizations[param]  # type: ignore[index]


def _tensors(parts: nn.Module) -> dict[str, Tensor]:
    return {**dict(parts.named_parameters(recurse=False)), **dict(parts.named_buffers(recurse=False))}


def _restore(parts: nn.Module, kept: dict[str, Tensor] | None) -> None:
    for name, tensor in _tensors(parts).items() if kept else ():
        tensor.copy_(kept[name])  # type: ignore[index]
