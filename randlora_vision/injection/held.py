"""Weights that a host keeps elsewhere or sets again itself: offloaded, sharded, without values, rounded to 8 bits.

What is written to such a parameter is lost or overwritten, usually without an error. Every function that replaces
weights therefore asks here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from randlora_vision.injection.offloaded import offloaded_modules
from randlora_vision.layers.adapted import adapted_modules, own_parameters
from randlora_vision.layers.torch_around import is_sharded
from randlora_vision.torch_internals import is_fsdp_managed

_LAYERS = "enable_sequential_cpu_offload (accelerate's cpu_offload, disk_offload or dispatch_model)"
_GROUPS = "enable_group_offload"


def refuse_offloaded(model: nn.Module, what: str, prefix: str = "") -> None:
    """Raise ValueError, `cannot WHAT: PREFIX.PATH ...`, if a part of `model` is offloaded layer by layer."""
    offloaded = offloaded_modules(model)
    for path, module in model.named_modules():
        if module in offloaded or _is_grouped(module):
            _refuse_offloaded(f"{prefix}.{path}".strip("."), what, _LAYERS if module in offloaded else _GROUPS)


def refuse_held_weights(root: nn.Module, what: str, unmerging: bool = False) -> None:
    """Raise ValueError if new weights of adapted layers under `root` would be lost; `what` (imperative) cannot be done.

    With `unmerging`, merged weights are replaced by former ones, which may all be on the meta device.
    """
    offloaded, grouped = offloaded_modules(root), any(map(_is_grouped, root.modules()))
    for path, module, param, _ in adapted_modules(root):
        own = module._parameters.get(param)
        tensors = list(module.parameters()) if own is None else [own]  # several if a parametrization computes it
        if module in offloaded or grouped:
            _refuse_offloaded(path, what, _LAYERS if module in offloaded else _GROUPS)
        if unmerging and all(tensor.is_meta for tensor in tensors) and module.frozen_weight(param).is_meta:
            tensors = []
        _refuse_elsewhere(f"{path}.{param}".lstrip("."), tensors, module, what)


def refuse_held_adapters(root: nn.Module, what: str) -> None:
    """Raise ValueError if the host also holds parameters that are deleted from their layers with the adapters.

    These are lambda and gamma, unless they were merged before, and parametrizations that a merged weight hides.
    """
    offloaded, grouped = offloaded_modules(root), any(map(_is_grouped, root.modules()))
    for path, module, param, state in adapted_modules(root):
        tensors = [tensor for name in state.slots for tensor in module.adapter_tensors(param, name)]
        if grouped or (module in offloaded and (state.is_folded or any(tensor.is_meta for tensor in tensors))):
            _refuse_offloaded(path, what, _GROUPS if grouped else _LAYERS)
        _refuse_sharded(f"{path}.{param}".lstrip("."), tensors, module, what)


def refuse_unfit(root: nn.Module, what: str) -> None:
    """Raise ValueError if a host holds weights of `root` in a way that has no place for new parameters."""
    if any(map(_is_grouped, root.modules())):
        refuse_offloaded(root, what)
    for path, module in root.named_modules():
        _refuse_sharded(path or type(module).__name__, list(own_parameters(module).values()), module, what)


def refuse_offloaded_tensors(root: nn.Module, paths: Iterable[str], what: str) -> None:
    """Raise ValueError if one of the tensors with these paths is offloaded: another one in its place would be lost."""
    offloaded = offloaded_modules(root)
    for path in paths:
        if offloaded and root.get_submodule(path.rpartition(".")[0]) in offloaded:
            _refuse_offloaded(path, what, _LAYERS)


def _refuse_elsewhere(name: str, tensors: Sequence[Tensor], module: nn.Module, what: str) -> None:
    _refuse_sharded(name, tensors, module, what)
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"cannot {what}: {name} is on the meta device and has no values; load its values first")
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1 and type(tensor.detach()) is Tensor:
            raise ValueError(
                f"cannot {what}: {name} is stored in {tensor.dtype}, to which the update would be rounded; {what} "
                "before enable_layerwise_casting, or convert the model to a wider dtype first"
            )


def _refuse_sharded(name: str, tensors: Sequence[Tensor | None], module: nn.Module, what: str) -> None:
    if any(hasattr(tensor, "ds_id") for tensor in tensors):
        how, before = "partitioned by DeepSpeed ZeRO-3", "deepspeed.initialize, without deepspeed.zero.Init"
    elif is_fsdp_managed(module):
        how, before = "sharded by FSDP", "the model is wrapped (fully_shard, FullyShardedDataParallel)"
    elif any(tensor is not None and is_sharded(tensor) and tensor.ndim > 1 for tensor in tensors):
        how, before = "a DTensor", "the model is distributed"
    else:
        return
    raise ValueError(
        f"cannot {what}: {name} is {how}; {what} before {before}, or load the gathered state dict into a model that is "
        "not wrapped"
    )


def _refuse_offloaded(path: str, what: str, call: str) -> None:
    raise ValueError(
        f"cannot {what}: {path or 'the model'} is offloaded layer by layer, and its hooks only handle the tensors that "
        f"existed when they were installed; {what} before {call}"
    )


def _is_grouped(module: nn.Module) -> bool:
    """True for a module with the hook of diffusers that offloads groups of layers."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None
