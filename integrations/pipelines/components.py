"""The parts of a diffusers pipeline that adapters live in, and the hooks that stand in their way."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from randlora_vision.injection.record import ModelRecord, records, unwrap

DENOISERS = ("unet", "transformer")
"""What pipelines call the part that an adapter alone belongs to."""


def components(pipe: Any) -> dict[str, nn.Module]:
    """Every part of a pipeline that is a module, the denoiser first.

    Raises:
        ValueError: If `pipe` is no pipeline.
    """
    held = getattr(pipe, "components", None)
    if isinstance(pipe, nn.Module) or not isinstance(held, Mapping):
        raise ValueError(
            f"give the pipeline, got {type(pipe).__name__}: for a model alone there are randlora_vision.load_adapter, "
            "set_scale, merge and the others"
        )
    modules = {name: unwrap(part) for name, part in held.items() if isinstance(part, nn.Module)}
    return dict(sorted(modules.items(), key=lambda item: item[0] not in DENOISERS))


def adapted(pipe: Any, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """The parts that have adapters, or have this one.

    Raises:
        ValueError: If there is none; the message lists what the pipeline has.
    """
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
    """The adapted parts with those of the names that each one knows; None stays None.

    Raises:
        ValueError: If no part has an adapter of a name.
    """
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
    """The records of a part, none if nothing was injected."""
    try:
        return [record for _, _, record in records(model)]
    except ValueError:
        return []


def refuse_offloaded(parts: Mapping[str, nn.Module], what: str) -> None:
    """Raise ValueError if weights of a part live elsewhere and are lent to it layer by layer.

    Hooks know the tensors that they found: new ones would stay behind, and changed ones be overwritten.
    """
    for part, model in parts.items():
        for path, module in model.named_modules():
            hook = getattr(module, "_hf_hook", None)
            if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
                call = "enable_sequential_cpu_offload"
            elif _group_offloaded(module):
                call = "enable_group_offload"
            else:
                continue
            raise ValueError(
                f"cannot {what}: {f'{part}.{path}'.rstrip('.')} is offloaded layer by layer, by hooks that know only "
                f"the tensors they found; {what} before {call}"
            )


def _group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None
