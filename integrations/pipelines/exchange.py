"""Adapters of a pipeline beside its saved weights, and other adapters in the place of those that it has."""

import os
from pathlib import Path
from typing import Any

from torch import nn

import randlora_vision
from randlora_vision.adapters.refill import checked_refill
from randlora_vision.integrations._download import ADAPTER_FILE
from randlora_vision.integrations.pipelines.adapter_files import read_parts, save_adapter
from randlora_vision.integrations.pipelines.components import DENOISERS, adapted, records_of


def swap_adapter(pipe: Any, source: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Replace the numbers of an adapter by those of another file, in place.

    No tensor changes its place or shape, so that a compiled denoiser is not compiled again, and scales stay.

    Args:
        pipe: The pipeline with the adapter.
        source: A file of the same targets, ranks, alphas and bases (seed), as `load_adapter` takes it.
        adapter_name: The adapter that gets the numbers.

    Raises:
        FileNotFoundError: Under the conditions of `load_adapter`.
        ValueError: If there is no such adapter, it is merged, or the file does not fit it. Nothing is then changed.
    """
    contents, path = read_parts(source)
    parts = adapted(pipe, adapter_name)
    if "" in contents:  # a file of the denoiser alone names no component
        contents = {next((part for part in parts if part in DENOISERS), next(iter(parts))): contents[""]}
    if set(contents) != set(parts):
        raise ValueError(f"{path} is for {', '.join(contents)}, but {adapter_name!r} is in {', '.join(parts)}")
    refuse_merged(parts, adapter_name, "swap it")
    copies = [checked_refill(model, contents[part](model), path, adapter_name) for part, model in parts.items()]
    for copy in copies:
        copy()


def save_pipeline(pipe: Any, folder: str | os.PathLike[str], adapter_name: str = "default", **options: Any) -> Path:
    """Write the pipeline without its adapters, and one of them beside it.

        save_pipeline(pipe, "folder")
        pipe = DiffusionPipeline.from_pretrained("folder")
        load_adapter(pipe, "folder")

    Args:
        pipe: The pipeline.
        folder: Where to; the adapter is ``adapter.safetensors`` in it.
        adapter_name: The adapter.
        options: Further arguments of ``pipe.save_pretrained``.

    Returns:
        The path of the adapter file.

    Raises:
        ValueError: If there is no such adapter, or an adapter is merged: `unfuse` first, or write the merged pipeline
            with ``pipe.save_pretrained``.
    """
    adapted(pipe, adapter_name)
    parts = adapted(pipe)
    refuse_merged(parts, None, "write the pipeline without it")
    active = {name: [n for record in records_of(part) for n in record.switches.active] for name, part in parts.items()}
    try:
        for part in parts.values():
            randlora_vision.set_active(part, [])
        pipe.save_pretrained(folder, **options)
    finally:
        for name, part in parts.items():
            randlora_vision.set_active(part, active[name])
    return save_adapter(pipe, Path(folder) / ADAPTER_FILE, adapter_name)


def refuse_merged(parts: dict[str, nn.Module], adapter_name: str | None, what: str) -> None:
    """Raise ValueError if an adapter, or the named one, is merged into a component."""
    for part, model in parts.items():
        for record in records_of(model):
            merged = [name for name in record.switches.merged if adapter_name in (None, name)]
            if merged:
                raise ValueError(f"adapter {merged[0]!r} is merged into {part}: unfuse it first, to {what}")
