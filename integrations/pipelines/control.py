"""Control the adapters of a pipeline at run time, in all components at once: scales, fusing, removal."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import randlora_vision
from randlora_vision.injection.control import scale_changes
from randlora_vision.integrations.pipelines.components import adapted, components, holding, records_of, refuse_offloaded
from randlora_vision.layers.state import AdapterSlot

Scale = float | Mapping[str, float | Mapping[str, float]]
"""Scale of one adapter: a number, or a mapping from components to a number or to a mapping from blocks to numbers."""


def set_scales(pipe: Any, scales: Scale | Mapping[str, Scale], adapter_name: str | None = None) -> None:
    """Set the scales of adapters: 1 is as trained, 0 is off. Scales that are not mentioned stay as they are.

        set_scales(pipe, 0.7)                                            # all adapters
        set_scales(pipe, 0.7, "style")                                   # one
        set_scales(pipe, {"unet": 0.8, "text_encoder": 0.3}, "style")    # by component
        set_scales(pipe, {"unet": {"down_blocks": 0.5, "mid_block": 0}}, "style")    # by block
        set_scales(pipe, {"style": 0.7, "subject": {"unet": 1.2}})       # several adapters at once

    Args:
        pipe: The pipeline.
        scales: The scales described above. A block is a prefix of layer names, up to a dot; the longest prefix that
            matches is used.
        adapter_name: Name of the adapter. Without it, the keys of a mapping are names of adapters.

    Raises:
        ValueError: If a number is not finite, an adapter, component or block does not exist, or an adapter is merged.
            No scale is then changed.
    """
    for slot, value in scale_changes_of(pipe, scales, adapter_name):
        slot.scale = value


def scale_changes_of(
    pipe: Any, scales: Scale | Mapping[str, Scale], adapter_name: str | None
) -> list[tuple[AdapterSlot, float]]:
    """Return what `set_scales` would change, and the new scales."""
    by_adapter: dict[str | None, Any] = {adapter_name: scales}
    if adapter_name is None and isinstance(scales, Mapping):
        by_adapter = {name: scale for name, scale in scales.items()}
        parts = components(pipe)
        if any(name in parts for name in by_adapter) and not any(name in _all_names(pipe) for name in by_adapter):
            raise ValueError(
                f"set_scales: expected names of adapters, got components: {', '.join(map(repr, by_adapter))}; name the "
                "adapter, set_scales(pipe, scales, adapter_name)"
            )
    changes: list[tuple[AdapterSlot, float]] = []
    for name, scale in by_adapter.items():
        parts = adapted(pipe, name)
        by_part = scale if isinstance(scale, Mapping) else {part: scale for part in parts}
        for part, value in by_part.items():
            if part not in parts:
                which = "have adapters" if name is None else f"have the adapter {name!r}"
                raise ValueError(f"set_scales: {part!r} is not among the components that {which}: {', '.join(parts)}")
            changes += scale_changes(parts[part], value, name)
    return changes


@contextlib.contextmanager
def disabled(pipe: Any) -> Iterator[None]:
    """Disable all RandLoRA adapters of the pipeline within the context, including merged ones.

    diffusers' own LoRA is not changed.

    Raises:
        ValueError: If the pipeline has no adapters, or has merged ones in a component that is offloaded layer by layer.
    """
    parts = adapted(pipe)
    merged = {
        name: model for name, model in parts.items() if any(record.switches.merged for record in records_of(model))
    }
    refuse_offloaded(merged, "disable merged adapters")
    with contextlib.ExitStack() as stack:
        for model in parts.values():
            stack.enter_context(randlora_vision.disabled(model))
        yield


def fuse(pipe: Any, adapter_names: str | Sequence[str] | None = None, safe: bool = True) -> None:
    """Merge adapters into the weights of all components, as `randlora_vision.merge` does: no cost at inference.

    Args:
        pipe: The pipeline.
        adapter_names: The adapters to merge, at their current scale; None means all active ones.
        safe: Refuse to merge if any result is not finite.

    Raises:
        ValueError: If there is no such adapter, a weight is packed (quantised), a result is not finite, or a component
            is offloaded layer by layer. The pipeline is then unchanged.
    """
    chosen = holding(pipe, adapter_names)
    refuse_offloaded({part: model for part, (model, _) in chosen.items()}, "fuse adapters")
    before = {
        part: {name for r in records_of(model) for name in r.switches.merged} for part, (model, _) in chosen.items()
    }
    done = []
    try:
        for part, (model, names) in chosen.items():
            randlora_vision.merge(model, names, safe)
            done.append(part)
    except BaseException:
        for part in done:
            model = chosen[part][0]
            new = [name for r in records_of(model) for name in r.switches.merged if name not in before[part]]
            randlora_vision.unmerge(model, new)
        raise


def unfuse(pipe: Any, adapter_names: str | Sequence[str] | None = None) -> None:
    """Restore the weights from before merging, bit for bit, for all merged adapters or the named ones.

    Raises:
        ValueError: If there is no such adapter, or a component is offloaded layer by layer.
    """
    chosen = holding(pipe, adapter_names)
    refuse_offloaded({part: model for part, (model, _) in chosen.items()}, "unfuse adapters")
    for model, names in chosen.values():
        randlora_vision.unmerge(model, names)


def delete_adapter(pipe: Any, adapter_name: str) -> None:
    """Delete an adapter from all components. After the last one, the pipeline is bit for bit as it was before.

    Raises:
        ValueError: If no component has the adapter, it is merged, or a component is offloaded layer by layer.
    """
    parts = adapted(pipe, adapter_name)
    merged = [part for part, model in parts.items() for r in records_of(model) if adapter_name in r.switches.merged]
    if merged:
        raise ValueError(f"adapter {adapter_name!r} is merged into {', '.join(merged)}: unfuse it first")
    refuse_offloaded(parts, "delete an adapter")
    for model in parts.values():
        randlora_vision.delete_adapter(model, adapter_name)


def list_adapters(pipe: Any) -> dict[str, list[str]]:
    """Return the names of the RandLoRA adapters by component, like ``get_list_adapters`` of diffusers."""
    named = {part: [n for r in records_of(model) for n in r.adapters] for part, model in components(pipe).items()}
    return {part: names for part, names in named.items() if names}


def _all_names(pipe: Any) -> set[str]:
    return {name for names in list_adapters(pipe).values() for name in names}
