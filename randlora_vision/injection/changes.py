"""Adapted weights that a host has removed, replaced or put out of use since the injection."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from randlora_vision.injection.record import ModelRecord
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules
from randlora_vision.layers.peft_around import plain_modules, plain_name
from randlora_vision.names import listing
from randlora_vision.report import Target

# Parts of an attention that its processor may replace by parts of its own: those of Custom Diffusion.
_OWN_PARTS = {
    "to_q_custom_diffusion": "to_q",
    "to_k_custom_diffusion": "to_k",
    "to_v_custom_diffusion": "to_v",
    "to_out_custom_diffusion": "to_out.0",
}


def holders(root: nn.Module, record: ModelRecord, adapter_name: str) -> dict[str, tuple[AdaptedModule, str] | None]:
    """Target name -> the module and parameter that hold the adapter's lambda and gamma, or None if they are gone."""
    modules = dict(plain_modules(root))
    return {target.name: _holder(modules, target, adapter_name) for target in record.adapters[adapter_name].targets}


def lost_message(names: list[str]) -> str:
    """What happened to the targets with these names."""
    return (
        f"{listing(names)}: adapted, but removed from the model or replaced since then, and with the weights their "
        "adapters (diffusers does so when it expands layers for a Control LoRA, unfuses projections or exchanges an "
        "IP-Adapter)"
    )


def refuse_changes(root: nn.Module, record: ModelRecord, adapter_names: Collection[str]) -> None:
    """Raise ValueError if weights of these adapters were replaced, or are no longer used, since the injection.

    A weight may be removed together with the module around it, because its function then leaves the model, as with
    ``unload_ip_adapter`` and the pruning of blocks.
    """
    modules = dict(plain_modules(root))
    known = [name for name in adapter_names if name in record.adapters]
    found = [item for name in known for item in holders(root, record, name).items()]
    lost = [name for name, holder in found if holder is None and name.rpartition(".")[0] in modules]
    if lost:
        raise ValueError(
            f"{lost_message(list(dict.fromkeys(lost)))}; what replaced them may hold copies of the adapted weights. "
            "Make such changes before the adapters are added, or merge the adapters first; now, call delete_adapter "
            "or remove, or load the model again"
        )
    unused = list(_unused(root, adapter_names))
    if unused:
        raise ValueError(
            f"the adapters of {listing(unused)} have no effect: the attention processor that was set since does not "
            "use these weights, but others (fused projections, or Custom Diffusion's own). Set it before the adapters "
            "are added, or merge the adapters first; now, call delete_adapter or remove, or set the former processor"
        )


def replaced_projections(attention: nn.Module) -> list[str]:
    """Names of the parts of a diffusers attention that are not used: those that fusing replaced, or the fused ones.

    An attention with `to_kv` and without `to_k` is not fused: it is made so (ConsisID's perceivers).
    """
    processor = getattr(attention, "processor", None)
    if processor is None and not hasattr(attention, "to_q"):
        return []
    fused = getattr(attention, "fused_projections", False)
    if type(attention).__name__ == "Attention":  # it may hold both; its processor decides which ones are used
        fused = fused and type(processor).__name__.startswith("Fused")
    replaced = {
        "to_qkv": ("to_q", "to_k", "to_v"),
        "to_kv": ("to_k", "to_v"),
        "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_added_kv": ("add_k_proj", "add_v_proj"),
    }
    present = {
        name: parts
        for name, parts in replaced.items()
        if hasattr(attention, name) and hasattr(attention, "to_q") and hasattr(attention, parts[-1])
    }
    found = [part for parts in present.values() for part in parts] if fused else list(present)
    return found + [part for own, part in _OWN_PARTS.items() if hasattr(processor, own)]


def _holder(modules: Mapping[str, nn.Module], target: Target, adapter_name: str) -> tuple[AdaptedModule, str] | None:
    for name in (target.name, *target.aliases):
        parent, _, last = name.rpartition(".")
        for path, param in ((name, "weight"), (parent, last)):
            module = modules.get(path)
            state = module.adapter_state(param) if isinstance(module, AdaptedModule) else None
            if state is not None and adapter_name in state.slots:
                assert isinstance(module, AdaptedModule)
                return module, param
    return None


def _unused(root: nn.Module, adapter_names: Collection[str]) -> Iterator[str]:
    """Paths of modules with these adapters in an attention whose processor does not use them."""
    adapted = [
        plain_name(path) for path, _, _, state in adapted_modules(root) if set(adapter_names) & set(state.live())
    ]
    for path, module in plain_modules(root):
        if hasattr(module, "processor"):
            names = [f"{path}.{part}" for part in replaced_projections(module)]
            yield from (p for p in adapted if any(f"{p}.".startswith(f"{name}.") for name in names))
