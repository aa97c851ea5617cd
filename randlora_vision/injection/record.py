"""What a model remembers of its adapters: their configurations, and what was frozen.

The record sits in the ``__dict__`` of the module that `inject` was called on, so that it is copied and pickled with
the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from randlora_vision.bases import BasesSpec
from randlora_vision.config import RandLoRAConfig
from randlora_vision.layers.adapted import AdaptedModule
from randlora_vision.layers.peft_around import plain_name
from randlora_vision.layers.state import Switches
from randlora_vision.names import is_adapter_name
from randlora_vision.report import Target
from randlora_vision.torch_internals import remove_load_hooks

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
    switches: Switches = dataclasses.field(default_factory=Switches)
    """The same object that every adapted weight holds."""
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
    remove_load_hooks(model, _before_load, _after_load)


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
