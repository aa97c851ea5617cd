"""What a model remembers of its adapters: configurations, what was frozen, and the modules trained in full.

The record sits in the ``__dict__`` of the module that `inject` was called on, so that it is copied and pickled with
the model. `modules_to_save` tensors are swapped, not overwritten: every adapter owns its copies, the base's own
Parameter objects are kept, and the module holds whichever is in force under the unchanged name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.bases import BasesSpec
from randlora_vision.config import RandLoRAConfig, matches_suffix
from randlora_vision.layers import AdaptedModule, is_adapter_name
from randlora_vision.report import Target
from randlora_vision.targets import with_parents
from randlora_vision.wrapping import plain_name

_KEY = "_randlora_record"


@dataclasses.dataclass
class AdapterRecord:
    """One adapter of a model."""

    config: RandLoRAConfig
    spec: BasesSpec
    targets: tuple[Target, ...]
    trainable: bool
    saved: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Path -> this adapter's own tensor of a module trained in full."""


@dataclasses.dataclass
class ModelRecord:
    """All adapters that were injected at one module."""

    requires_grad: dict[str, bool]
    """The flags before the first injection, by parameter name."""
    adapters: dict[str, AdapterRecord] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    originals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Path -> the base's tensor of a module trained in full."""
    installed: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Path -> the adapter whose tensor the module holds now, None for the base's."""
    half_loaded: list[str] = dataclasses.field(default_factory=list)
    """Adapter keys that the state dict being loaded lacks although it has others."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model under `torch.compile` and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def own_record(model: nn.Module) -> ModelRecord | None:
    """The record of this very module."""
    return model.__dict__.get(_KEY)


def make_record(model: nn.Module) -> ModelRecord:
    """The module's record, made on first use."""
    record = own_record(model)
    if record is None:
        flags = {plain_name(name): parameter.requires_grad for name, parameter in model.named_parameters()}
        record = model.__dict__[_KEY] = ModelRecord(flags)
        model.register_load_state_dict_pre_hook(_before_load)
        model.register_load_state_dict_post_hook(_after_load)
    return record


def drop_record(model: nn.Module) -> None:
    """Forget the module's record."""
    del model.__dict__[_KEY]
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_before_load, _after_load):
                del hooks[key]


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Note which adapter keys are absent from a state dict that has others: it is no base checkpoint."""
    record = own_record(module)
    assert record is not None
    own = [prefix + name for name, _ in module.named_parameters(remove_duplicate=False) if is_adapter_name(name)]
    absent = [name for name in own if name not in state_dict]
    record.half_loaded = absent if len(absent) < len(own) else []


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """Count them as missing: every layer alone takes its own absence for a base checkpoint's."""
    record = own_record(module)
    assert record is not None
    incompatible.missing_keys.extend(name for name in record.half_loaded if name not in incompatible.missing_keys)
    record.half_loaded = []


def check_root(model: nn.Module) -> None:
    """Raise ValueError unless adapters may be injected at this module: a model has one place for all of them."""
    wrapped: object = model
    while isinstance(wrapped, nn.Module):
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise ValueError("inject before wrapping the model in DistributedDataParallel, which knows its parameters")
        wrapped = getattr(wrapped, "_orig_mod", None)
    model = unwrap(model)
    inner = [path for path, module in model.named_modules() if path and _KEY in module.__dict__]
    if inner:
        raise ValueError(f"adapters were injected at {inner[0]!r}: inject there, or remove them first")
    if own_record(model) is None and any(isinstance(module, AdaptedModule) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is part of a model that adapters were injected at: inject there (with "
            "target_modules that name this part), or remove them first"
        )


def records(model: nn.Module) -> list[tuple[str, nn.Module, ModelRecord]]:
    """(path, module, record) of every module under `model` that adapters were injected at.

    Raises:
        ValueError: If there is none.
    """
    found = [(path, module, module.__dict__[_KEY]) for path, module in model.named_modules() if _KEY in module.__dict__]
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no adapters; give the module that inject or load_adapter was called on"
        )
    return found


def count_base(model: nn.Module) -> int:
    """Numbers in the model without its adapters; lazy parameters, whose size is not known yet, left out."""
    lazy = nn.parameter.UninitializedParameter
    own = (p for path, p in model.named_parameters() if not is_adapter_name(path))
    return sum(p.numel() for p in own if not isinstance(p, lazy))


def check_names(model: nn.Module, names: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """The given adapter names as a tuple, all of the model's for None.

    Raises:
        ValueError: If the model has no adapter of a name.
    """
    known = list(dict.fromkeys(name for _, _, record in records(model) for name in record.adapters))
    wanted = tuple(known) if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no adapter {name!r}; this model has: {', '.join(known)}")
    return wanted


def find_saved(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Path -> parameter or persistent buffer under the modules or parameters that `names` match, tied ones once.

    Raises:
        ValueError: If a name matches nothing.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        before = len(seen)
        for path, module in model.named_modules():
            own = [
                *module._parameters,
                *(b for b in module._buffers if b not in module._non_persistent_buffers_set),
            ]
            for tensor_name in own:
                full = f"{path}.{tensor_name}" if path else tensor_name
                tensor = _get(model, full)
                if tensor is not None and any(matches_suffix(name, part) for part in with_parents((full,))):
                    if id(tensor) not in seen:
                        found[full] = tensor
                        seen.add(id(tensor))
        if len(seen) == before:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save: {name!r} matches nothing; the model's top level has: {children}")
    return found


def own_saved(model: nn.Module, record: ModelRecord, adapter: AdapterRecord) -> None:
    """Give the adapter its own copies of its `modules_to_save`; `install_saved` puts them in force."""
    for path, tensor in find_saved(model, adapter.config.modules_to_save).items():
        if path not in record.originals:
            record.originals[path] = tensor
            record.installed[path] = None
        copy = tensor.detach().clone()
        adapter.saved[path] = nn.Parameter(copy, adapter.trainable) if isinstance(tensor, nn.Parameter) else copy


def install_saved(model: nn.Module, record: ModelRecord) -> None:
    """Put in force, for every tensor trained in full, the last active adapter's, else the base's."""
    in_force = (*record.merged, *record.active) if record.enabled else record.merged
    for path, holder in record.installed.items():
        wanted = next((name for name in reversed(in_force) if path in record.adapters[name].saved), None)
        if wanted == holder:
            continue
        current = _installed(model, record, path)
        _keep(record, path, holder, current)
        tensor = record.originals[path] if wanted is None else record.adapters[wanted].saved[path]
        _replace(model, current, _alike(tensor, current))
        record.installed[path] = wanted


def current_saved(model: nn.Module, record: ModelRecord, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors trained in full, in force or not."""
    for path, holder in record.installed.items():
        if holder == adapter_name:
            _keep(record, path, holder, _installed(model, record, path))
    return record.adapters[adapter_name].saved


def _installed(model: nn.Module, record: ModelRecord, path: str) -> Tensor:
    """The tensor trained in full that the model holds now; raises ValueError if it is another module's by now."""
    expected = record.originals[path].shape
    try:
        tensor = _get(model, path)
    except AttributeError:
        tensor = None
    if tensor is None or tensor.shape != expected:
        found = "gone" if tensor is None else f"{tuple(tensor.shape)} by now"
        raise ValueError(
            f"{path}, trained with an adapter (modules_to_save), was {tuple(expected)} and is {found}: the model was "
            "changed after inject (reset_classifier?); remove the adapters first"
        )
    return tensor


def _keep(record: ModelRecord, path: str, holder: str | None, tensor: Tensor) -> None:
    """Store what the module holds: buffers, and tensors that `.to` moved, are new objects."""
    if holder is None:
        record.originals[path] = tensor
    else:
        record.adapters[holder].saved[path] = tensor


def _alike(tensor: Tensor, current: Tensor) -> Tensor:
    """`tensor` on the device and in the dtype that the model has moved to; itself where nothing changed."""
    if tensor.device == current.device and tensor.dtype == current.dtype:
        return tensor
    moved = tensor.detach().to(device=current.device, dtype=current.dtype)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _get(model: nn.Module, path: str) -> Tensor | None:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    return module._parameters.get(name) if name in module._parameters else module._buffers.get(name)


@torch.no_grad()
def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever the model holds `old`, so that tied tensors stay tied."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is old:
                    table[name] = new  # type: ignore[assignment]
