"""The components of a diffusers pipeline that can have adapters, and the offloading hooks that conflict with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from randlora_vision.injection import held
from randlora_vision.injection.record import ModelRecord, records, unwrap

DENOISERS = ("unet", "transformer")
"""The names of the denoiser in pipelines: the default component for a file with one adapter."""


def components(pipe: Any) -> dict[str, nn.Module]:
    """Return the components that are modules, the denoiser first; raise ValueError unless `pipe` is a pipeline."""
    held = getattr(pipe, "components", None)
    if isinstance(pipe, nn.Module) or not isinstance(held, Mapping):
        raise ValueError(
            f"expected a diffusers pipeline, got {type(pipe).__name__}: for a single model, use "
            "randlora_vision.load_adapter, set_scale, merge and so on"
        )
    modules = {name: unwrap(part) for name, part in held.items() if isinstance(part, nn.Module)}
    return dict(sorted(modules.items(), key=lambda item: item[0] not in DENOISERS))


def absent_components(pipe: Any) -> set[str]:
    """Return the components that the pipeline's class has and that this pipeline was loaded without."""
    return {name for name, part in pipe.components.items() if part is None}


def adapted(pipe: Any, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """Return the components that have adapters, or the given one; raise ValueError, with those there are, for none."""
    found = {name: part for name, part in components(pipe).items() if adapter_name in (None, *_names(part))}
    if adapter_name is None:
        found = {name: part for name, part in found.items() if _names(part)}
    if not found:
        known = dict.fromkeys(name for part in components(pipe).values() for name in _names(part))
        if adapter_name is None or not known:
            raise ValueError(f"this {type(pipe).__name__} has no RandLoRA adapters: load_adapter(pipe, file) adds one")
        raise ValueError(f"no adapter {adapter_name!r}; this {type(pipe).__name__} has: {', '.join(known)}")
    return found


def holding(pipe: Any, names: str | Sequence[str] | None) -> dict[str, tuple[nn.Module, list[str] | None]]:
    """Return the adapted components, each with those of the names that it has (None: all); ValueError without any."""
    if names is None:
        return {part: (model, None) for part, model in adapted(pipe).items()}
    found: dict[str, tuple[nn.Module, list[str] | None]] = {}
    for name in [names] if isinstance(names, str) else names:
        for part, model in adapted(pipe, name).items():
            found.setdefault(part, (model, []))
            known = found[part][1]
            assert known is not None
            known.append(name)
    return found


def _names(model: nn.Module) -> list[str]:
    return [name for record in records_of(model) for name in record.adapters]


def records_of(model: nn.Module) -> list[ModelRecord]:
    """Return the records of a component; empty if nothing was injected."""
    try:
        return [record for _, _, record in records(model)]
    except ValueError:
        return []


def refuse_offloaded(parts: Mapping[str, nn.Module], what: str) -> None:
    """Raise ValueError if weights of a component are offloaded and temporarily loaded layer by layer.

    The hooks only handle the tensors that existed when they were installed: new tensors would not be moved, and changed
    tensors would be overwritten.
    """
    for part, model in parts.items():
        held.refuse_offloaded(model, what, part)
