"""The modules that are trained in full in addition to the adapters (`modules_to_save`).

Their tensors are swapped, not overwritten: every adapter has its own copies, the base's Parameter objects are kept,
and the module holds the tensors currently in use under the unchanged name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from randlora_vision.injection.candidates import described
from randlora_vision.injection.record import AdapterRecord, ModelRecord
from randlora_vision.layers.adapted import AdaptedModule
from randlora_vision.names import is_adapter_name, listing, suffixes, with_parents
from randlora_vision.torch_internals import persistent_names


def find_saved(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Find the parameters and persistent buffers by path that `names` match, with tied tensors listed once.

    Raises:
        ValueError: If a name matches nothing that can be trained or saved; the message says what it matches.
    """
    if not names:
        return {}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    unmatched, wanted = dict.fromkeys(names), set(names)
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor_name in persistent_names(module):
            full = f"{path}.{tensor_name}" if path else tensor_name
            asked = {suffix for part in with_parents((full,)) for suffix in suffixes(part)} & wanted
            tensor = None if is_adapter_name(full) or not asked else _get(model, full)
            if tensor is None:
                continue
            for name in asked:
                unmatched.pop(name, None)
            if id(tensor) not in seen:
                found[full] = tensor
                seen.add(id(tensor))
    for name in unmatched:
        children = ", ".join(name for name, _ in model.named_children())
        what = described(model, name)
        why = (
            f"matches nothing; the model's top level has: {children}"
            if what is None
            else f"{what}, which is not part of the state dict"
        )
        raise ValueError(f"modules_to_save: {name!r} {why}")
    return found


def listed_saved(model: nn.Module, paths: Iterable[str], adapted: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the model's parameters and persistent buffers at exactly these paths.

    Args:
        model: The model.
        paths: The paths of the tensors that a file holds.
        adapted: The weights that the same file adapts.

    Raises:
        ValueError: If the model lacks one of them, has one tensor at two of the paths, or it is adapted as well.
    """
    wanted = set(paths)
    if not wanted:
        return {}
    have = {
        f"{path}.{name}".lstrip("."): _get(model, f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name in persistent_names(module)
        if not is_adapter_name(name)
    }
    found = {path: tensor for path, tensor in have.items() if tensor is not None and path in wanted}
    missing = sorted(wanted - found.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of the file's tensors trained in full (modules_to_save) are not in the model "
            f"({listing(missing, 3)})"
        )
    owners = dict.fromkeys(map(id, adapted), "a target of the same file")
    for path, tensor in found.items():
        if id(tensor) in owners:
            raise ValueError(f"in the model, {path} is the same tensor as {owners[id(tensor)]}")
        owners[id(tensor)] = path
    return found


def own_saved(record: ModelRecord, adapter: AdapterRecord, saved: Mapping[str, Tensor]) -> None:
    """Give the adapter its own copies of the tensors to train in full; `install_saved` then installs them."""
    for path, tensor in saved.items():
        if path not in record.originals:
            record.originals[path] = tensor
            record.installed[path] = None
        copy = tensor.detach().clone()
        adapter.saved[path] = nn.Parameter(copy, adapter.trainable) if isinstance(tensor, nn.Parameter) else copy


def install_saved(model: nn.Module, record: ModelRecord) -> None:
    """Install, for every tensor trained in full, that of the last active adapter, or the base's if there is none."""
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
    """The adapter's tensors trained in full, whether they are installed or not."""
    for path, holder in record.installed.items():
        if holder == adapter_name:
            _keep(record, path, holder, _installed(model, record, path))
    return record.adapters[adapter_name].saved


def saved_by_module(
    model: nn.Module, record: ModelRecord, names: Sequence[str | None]
) -> list[tuple[nn.Module, dict[str | None, dict[str, Tensor]]]]:
    """Every module whose own tensors differ from those now in it for one of these adapters, or None for the base.

    Returns:
        (module, {adapter: {name in the module: tensor}}).

    Raises:
        ValueError: If such a module has parts of its own or an adapted weight, and cannot be called once per adapter.
    """
    own = {name: record.originals if name is None else current_saved(model, record, name) for name in names}
    found: dict[nn.Module, dict[str | None, dict[str, Tensor]]] = {}
    for path, holder in record.installed.items():
        if holder is None and not any(name is not None and path in tensors for name, tensors in own.items()):
            continue
        current = _installed(model, record, path)
        _keep(record, path, holder, current)
        for module in model.modules():
            tables = (*module._parameters.items(), *module._buffers.items())
            for key in [key for key, tensor in tables if tensor is current]:
                if module._modules or isinstance(module, AdaptedModule):
                    raise ValueError(
                        f"per_sample: {path} is trained in full (modules_to_save) and belongs to a "
                        f"{type(module).__name__} that cannot be called once per adapter: run the samples of each "
                        "adapter separately (randlora_vision.set_active)"
                    )
                for name, tensors in own.items():
                    tensor = _alike(tensors.get(path, record.originals[path]), current)
                    found.setdefault(module, {}).setdefault(name, {})[key] = tensor
    return list(found.items())


def _installed(model: nn.Module, record: ModelRecord, path: str) -> Tensor:
    """The tensor trained in full that the model holds now; raises ValueError if the module has been replaced."""
    expected = record.originals[path].shape
    try:
        tensor = _get(model, path)
    except AttributeError:
        tensor = None
    if tensor is None or tensor.shape != expected:
        found = "gone" if tensor is None else f"{tuple(tensor.shape)}"
        raise ValueError(
            f"{path}, trained with an adapter (modules_to_save), was {tuple(expected)} and is now {found}: the model "
            "was changed after inject (reset_classifier, load_textual_inversion?); undo that, or load the model again"
        )
    return tensor


def _keep(record: ModelRecord, path: str, holder: str | None, tensor: Tensor) -> None:
    """Store the tensor that the module holds: buffers, and tensors moved by `.to`, are new objects."""
    if holder is None:
        record.originals[path] = tensor
    else:
        record.adapters[holder].saved[path] = tensor


def _alike(tensor: Tensor, current: Tensor) -> Tensor:
    """`tensor` on the device and in the dtype of `current`; the same object if nothing changes."""
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
    """Replace `old` by `new` everywhere in the model, so that tied tensors stay tied."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is old:
                    table[name] = new  # type: ignore[assignment]
