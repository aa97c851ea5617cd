"""A model's record of its adapters: their configurations, and which parameters were frozen.

The record is stored in the ``__dict__`` of the module that `inject` was called on, so it is copied and pickled with
the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from randlora_vision.bases import BasesSpec
from randlora_vision.config import RandLoRAConfig
from randlora_vision.layers.adapted import AdaptedModule, base_parameters
from randlora_vision.layers.peft_around import inside, plain_name
from randlora_vision.layers.state import Switches
from randlora_vision.names import is_adapter_name
from randlora_vision.report import Target
from randlora_vision.torch_internals import remove_hooks

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
    check: object = None
    """The check of the bases that is made before their first use, as long as a record refers to it."""


@dataclasses.dataclass
class ModelRecord:
    """All adapters that were injected into one module."""

    requires_grad: dict[str, bool]
    """The flags before the first injection, by parameter name."""
    adapters: dict[str, AdapterRecord] = dataclasses.field(default_factory=dict)
    switches: Switches = dataclasses.field(default_factory=Switches)
    """The same object that every adapted weight holds."""
    originals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Path -> the base's tensor of a module trained in full."""
    installed: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Path -> the adapter whose tensor the module holds now, or None for the base's."""
    half_loaded: list[str] = dataclasses.field(default_factory=list)
    """Adapter keys that are missing from the state dict being loaded although it has others."""
    layout: object = None
    """Where the adapted modules were at the last call, for `host_calls`; copies of a model find it anew."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without `layout`."""
        return {**self.__dict__, "layout": None}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, DistributedDataParallel and FSDP.

    Raises:
        ValueError: If it is not a module: a name, or a pipeline of diffusers.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(_not_a_module(model))
    while isinstance(model := inside(model), nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _not_a_module(value: object) -> str:
    if isinstance(value, type):
        return f"expected a torch.nn.Module, got the class {value.__name__}: create the model first"
    if isinstance(value, str):
        return f"expected a torch.nn.Module, got the string {value!r}: create the model first"
    parts = getattr(value, "components", None)
    modules = [name for name, part in parts.items() if isinstance(part, nn.Module)] if isinstance(parts, dict) else []
    if modules:
        return (
            f"expected a torch.nn.Module, got a {type(value).__name__}: pass one of its parts ({', '.join(modules)}); "
            "for files and scales of the whole pipeline, use the functions of randlora_vision.integrations.diffusers"
        )
    inside_it = isinstance(value, (tuple, list)) and any(isinstance(part, nn.Module) for part in value)
    hint = ": pass the model in it alone" if inside_it else ""
    return f"expected a torch.nn.Module, got a {type(value).__name__}{hint}"


def own_record(model: nn.Module) -> ModelRecord | None:
    """The record of this module itself, or None."""
    return model.__dict__.get(_KEY)


def make_record(model: nn.Module) -> ModelRecord:
    """The module's record, created on first use."""
    record = own_record(model)
    if record is None:
        flags = {plain_name(name): parameter.requires_grad for name, parameter in model.named_parameters()}
        record = model.__dict__[_KEY] = ModelRecord(flags)
        model.register_load_state_dict_pre_hook(_before_load)
        model.register_load_state_dict_post_hook(_after_load)
    return record


def drop_record(model: nn.Module) -> None:
    """Delete the module's record."""
    del model.__dict__[_KEY]
    remove_hooks(model, _before_load, _after_load)


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Note which adapter keys are absent from a state dict that has others, and so is not a base checkpoint."""
    record = own_record(module)
    assert record is not None
    own = [prefix + name for name, _ in module.named_parameters(remove_duplicate=False) if is_adapter_name(name)]
    present = {plain_name(name) for name in state_dict}  # FSDP renames the keys of its parts one after another
    absent = [name for name in own if plain_name(name) not in present]
    record.half_loaded = absent if len(absent) < len(own) else []


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """Report those keys as missing: each layer on its own treats their absence as that of a base checkpoint."""
    record = own_record(module)
    assert record is not None
    incompatible.missing_keys.extend(name for name in record.half_loaded if name not in incompatible.missing_keys)
    record.half_loaded = []


def check_root(model: nn.Module) -> None:
    """Raise ValueError unless adapters may be injected into this module: a model has one root for all of them."""
    unwrapped = unwrap(model)
    if isinstance(inside(model), nn.parallel.DistributedDataParallel):
        raise ValueError("inject before wrapping the model in DistributedDataParallel, which registers parameters")
    model = unwrapped
    inner = [path for path, module in model.named_modules() if path and _KEY in module.__dict__]
    if inner:
        raise ValueError(f"adapters were already injected into {inner[0]!r}: inject there, or remove them first")
    if own_record(model) is None and any(isinstance(module, AdaptedModule) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is part of a model that already has adapters: inject into that model (with "
            "target_modules that name this part), or remove them first"
        )


def records(model: nn.Module) -> list[tuple[str, nn.Module, ModelRecord]]:
    """(path, module, record) of every module in `model` that was injected into; ValueError if there is none."""
    found = [(path, module, module.__dict__[_KEY]) for path, module in model.named_modules() if _KEY in module.__dict__]
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no adapters; pass the module that inject or load_adapter was called on"
        )
    return found


def refuse_in_block(record: ModelRecord, what: str) -> None:
    """Raise ValueError within `per_sample`, where the adapters of the samples are in use."""
    if record.switches.mixture is not None:
        raise ValueError(f"cannot {what} within per_sample: leave the block first")


def refuse_merged(record: ModelRecord, names: Iterable[str]) -> None:
    """Raise ValueError if one of the adapters is merged into the weights."""
    for name in names:
        if name in record.switches.merged:
            raise ValueError(f"adapter {name!r} is merged into the weights: unmerge it first")


def count_base(model: nn.Module) -> int:
    """Number of parameters without the adapters; lazy parameters, whose size is not known yet, are left out."""
    lazy = nn.parameter.UninitializedParameter
    return sum(p.numel() for _, p in base_parameters(model) if not isinstance(p, lazy))


def check_names(model: nn.Module, names: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """The given adapter names as a tuple; None means all adapters of the model.

    Raises:
        ValueError: If the model has no adapter with one of the names.
    """
    owners = [record.adapters for _, _, record in records(model)]
    if names is None:
        return tuple(dict.fromkeys(name for adapters in owners for name in adapters))
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if not any(name in adapters for adapters in owners):
            known = dict.fromkeys(name for adapters in owners for name in adapters)
            raise ValueError(f"no adapter {name!r}; this model has: {', '.join(known)}")
    return wanted
