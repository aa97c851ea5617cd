"""The modules that are trained in full beside the adapters (`modules_to_save`).

Their tensors are swapped, not overwritten: every adapter owns its copies, the base's own Parameter objects are kept,
and the module holds whichever is in force under the unchanged name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from randlora_vision.injection.record import (
    AdapterRecord,
    ModelRecord,
)
from randlora_vision.names import matches_suffix, with_parents
from randlora_vision.torch_internals import persistent_names


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
            for tensor_name in persistent_names(module):
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
    in_force = (*record.switches.merged, *record.switches.active) if record.switches.enabled else record.switches.merged
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
