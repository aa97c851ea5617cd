"""Save merged models in the format of their host library: the saved files do not depend on this library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from randlora_vision.files.atomic import replacing, replacing_folder
from randlora_vision.injection.held import refuse_offloaded
from randlora_vision.injection.merge import merge, unmerge
from randlora_vision.injection.record import ModelRecord, check_names, records, unwrap
from randlora_vision.injection.trained_in_full import install_saved
from randlora_vision.integrations.export.updates import components, in_force, updates
from randlora_vision.names import is_adapter_name


@contextlib.contextmanager
def merged_for_saving(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Module]:
    """Make `state_dict` that of the merged model within the context; afterwards the model is as before.

    Within the context, the adapted weights take twice the memory.

    Args:
        model: The module that adapters were injected at, or a parent of it.
        adapter_name: Name of the only adapter to merge; None means all merged or active ones.

    Raises:
        ValueError: If there is no such adapter, a weight is quantised, the model is offloaded layer by layer, or a
            merged weight is not finite.
    """
    model = unwrap(model)
    check_names(model, adapter_name)
    refuse_offloaded(model, "save a merged model")
    before = [(root, record, record.switches.merged, record.switches.active) for _, root, record in records(model)]
    hook = model.register_state_dict_post_hook(_drop_adapters)
    try:
        for root, record, _, _ in before:
            names = in_force(record) if adapter_name is None else (adapter_name,)
            _put(root, record, tuple(name for name in names if name in record.adapters), ())
        yield model
    finally:
        hook.remove()
        for root, record, merged, active in before:
            _put(root, record, merged, active)


def save_merged_file(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write the state dict of the merged model to one safetensors file; the model is not changed.

    Raises:
        ValueError: If the name does not end in ``.safetensors``, or as `merged_for_saving` does.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"a merged model is saved to one .safetensors file, got the name {str(path)!r}")
    with merged_for_saving(model, adapter_name) as merged, replacing(target) as temporary:
        safetensors.torch.save_file(_separate(merged.state_dict()), temporary, {"format": "pt"})
    return target


def save_merged_folder(host: Any, folder: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write a merged diffusers pipeline or model with its own `save_pretrained`; the host is not changed.

    Args:
        host: A pipeline with adapted components, or one such model.
        folder: A new folder, or an empty one. It is written completely or not at all.
        adapter_name: Name of the only adapter to merge; None means all merged or active ones.

    Raises:
        FileExistsError: If the folder is not empty.
        ValueError: If there is no such adapter, or as `merged_for_saving` does.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(folder)!r} exists and is not an empty folder: choose another name")
    adapted = dict.fromkeys(update.component for update in updates(host, adapter_name))
    with replacing_folder(target) as temporary, contextlib.ExitStack() as stack:
        for component in adapted:
            stack.enter_context(merged_for_saving(components(host)[component], adapter_name))
        host.save_pretrained(temporary, safe_serialization=True)
    return target


def _put(root: nn.Module, record: ModelRecord, merged: tuple[str, ...], active: tuple[str, ...]) -> None:
    """Merge exactly the adapters in `merged`, in this order (rounding depends on it), and set the active ones."""
    if record.switches.merged != merged:
        unmerge(root)
        if merged:
            merge(root, merged)
    record.switches.active = active
    install_saved(root, record)


def _drop_adapters(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state_dict if is_adapter_name(name)]:
        del state_dict[name]


def _separate(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory: the format does not support tied tensors."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return found
