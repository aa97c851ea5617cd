"""Saving an adapter to one small .safetensors file, and loading it into a base model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision.adapters import peft_folder
from randlora_vision.bases import get_bases
from randlora_vision.errors import printable_errors
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.claims import LaterCheck, check_bases
from randlora_vision.files.untrusted import check_finite, check_finite_pairs
from randlora_vision.injection.changes import holders, lost_message
from randlora_vision.injection.inject import add_adapter
from randlora_vision.injection.offloaded import Offloaded, offloaded_modules
from randlora_vision.injection.plan import AdapterPlan, make_plan, weight_of
from randlora_vision.injection.record import AdapterRecord, check_names, own_record, records, unwrap
from randlora_vision.injection.trained_in_full import current_saved
from randlora_vision.layers.adapted import AdaptedModule
from randlora_vision.layers.torch_around import is_sharded
from randlora_vision.names import PARTS, parameter_name
from randlora_vision.report import InjectionReport
from randlora_vision.torch_internals import is_fsdp_managed


def save_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter's lambda, gamma and `modules_to_save`; the bases are stored as their seed.

    Args:
        model: The module that `inject` was called on (bare, compiled, or in DistributedDataParallel).
        path: A name ending in ``.safetensors``; missing folders are created. The file is written atomically.
        adapter_name: The adapter to save.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no such adapter, it holds NaN or infinity, or the name does not end in
            ``.safetensors``.
        OSError: If the file cannot be written.
    """
    target = target_file(path)
    adapter_file.write(target, *packed(model, adapter_name))
    return target


def target_file(path: str | os.PathLike[str]) -> Path:
    """Return the path to write; raises ValueError unless it ends in ``.safetensors``."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"an adapter is saved as one .safetensors file, got the file name {str(path)!r}")
    return target


def packed(model: nn.Module, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the file that `save_adapter` writes."""
    adapter, tensors, saved = own_adapter(model, adapter_name)
    crc32 = get_bases(adapter.spec).crc32
    return adapter_file.pack(adapter.config, adapter.spec, crc32, adapter.targets, tensors, saved)


def own_adapter(
    model: nn.Module, adapter_name: str
) -> tuple[AdapterRecord, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return an adapter's record, target name -> (lambda, gamma), and its tensors trained in full by path.

    Targets that a host has removed from the model are left out, with a warning.

    Raises:
        ValueError: If the model has no such adapter, it was injected into another module, it is on the meta device or
            sharded, all its targets are gone, or it holds NaN or infinity.
    """
    model = unwrap(model)
    record = own_record(model)
    if record is None:
        where = records(model)[0][0]
        raise ValueError(f"the adapters were injected into {where!r}: pass that module to save_adapter")
    check_names(model, adapter_name)
    found, offloaded = holders(model, record, adapter_name), offloaded_modules(model)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, held in found.items():
        if held is not None:
            tensors[name] = _values(*held, adapter_name, offloaded)
    adapter = record.adapters[adapter_name]
    if len(tensors) < len(found):
        lost = lost_message([name for name, held in found.items() if held is None])
        if not tensors:
            raise ValueError(f"nothing is left of adapter {adapter_name!r}: {lost}")
        warnings.warn(f"{lost}; the other {len(tensors)} targets are saved", stacklevel=4)
        adapter = dataclasses.replace(adapter, targets=tuple(t for t in adapter.targets if t.name in tensors))
    for name, pair in tensors.items():
        if any(tensor.is_meta for tensor in pair):
            raise ValueError(f"adapter {adapter_name!r} is on the meta device and has no values to save")
        if any(is_sharded(tensor) for tensor in pair):
            raise ValueError(
                f"adapter {adapter_name!r} is sharded at {name}: gather it on all processes to save it, for example "
                "within FullyShardedDataParallel.summon_full_params(model), or between model.unshard() and "
                "model.reshard()"
            )
    saved = current_saved(model, record, adapter_name)
    check_finite_pairs(f"adapter {adapter_name!r}", tensors)
    check_finite(f"adapter {adapter_name!r}", {n: t for n, t in saved.items() if isinstance(t, nn.Parameter)})
    if any(map(is_fsdp_managed, model.modules())):  # FSDP cannot free memory that is used without PyTorch
        tensors = {name: (lam.detach().clone(), gamma.detach().clone()) for name, (lam, gamma) in tensors.items()}
        saved = {name: tensor.detach().clone() for name, tensor in saved.items()}
    return adapter, tensors, saved


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    trainable: bool = False,
    peft_dtype: torch.dtype = torch.bfloat16,
) -> InjectionReport:
    """Add the adapter in a file to its base model; everything is checked before the model is changed.

    Exactly the weights and modules that the file lists are adapted: whatever else the model has stays the base's. A
    model on the meta device gets lambda and gamma on the CPU, and its weights may follow, by
    ``load_state_dict(..., assign=True)`` or after ``to_empty``, which keeps such an adapter; its bases are drawn, and
    compared with those of the training, when they are first needed.

    Args:
        model: The base model. It may already have other adapters; the loaded one is added to the active ones.
        path: A file written by `save_adapter`, or a RandLora folder written by PEFT.
        adapter_name: The adapter's name in this model.
        trainable: True to train it further.
        peft_dtype: The dtype in which PEFT drew the projections if its folder does not hold them: bfloat16, or
            float16 on hardware without bfloat16. The folder does not record it.

    Returns:
        What was adapted. For a PEFT folder without projections, `warnings` mentions `peft_dtype`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an adapter file, is damaged, altered or of a newer format, does not fit this
            model, or its bases cannot be reproduced; if it has modules trained in full and the model is on the meta
            device. The model is then left unchanged.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no adapter file {str(path)!r}")
    model = unwrap(model)
    if source.is_dir():
        content = peft_folder.read(source, peft_dtype).fit(model)
        return install(plan_for(model, content, adapter_name, source), content, trainable)
    with adapter_file.reading(source) as content:
        plan = plan_for(model, content, adapter_name, source)
    return install(plan, content, trainable)


def install(plan: AdapterPlan, content: AdapterFile, trainable: bool) -> InjectionReport:
    """Carry out a plan of `plan_for` and copy the trained values."""
    add_adapter(plan, trainable, valued=True)
    model, name = plan.model, plan.report.adapter_name
    record = own_record(model)
    assert record is not None
    if plan.check_later is not None:
        record.adapters[name].check = plan.check_later()
    with torch.no_grad():
        for candidate in plan.candidates:
            module, param = candidate.owners[0]
            assert isinstance(module, AdaptedModule)
            for tensor, value in zip(module.adapter_tensors(param, name), content.trained[candidate.name], strict=True):
                tensor.copy_(value)
        for path, whole in current_saved(model, record, name).items():
            whole.copy_(content.saved[path])
    return dataclasses.replace(plan.report, warnings=(*plan.report.warnings, *content.notes))


def _values(
    module: AdaptedModule, param: str, adapter_name: str, offloaded: Mapping[nn.Module, Offloaded]
) -> tuple[Tensor, Tensor]:
    """Lambda and gamma of an adapter, which may be offloaded."""
    tensors = module.adapter_tensors(param, adapter_name)
    if not tensors[0].is_meta or module not in offloaded:
        return tensors
    lam, gamma = (offloaded[module].value(parameter_name(param, part, adapter_name)) for part in PARTS)
    return lam, gamma


@printable_errors
def plan_for(model: nn.Module, content: AdapterFile, adapter_name: str, path: str | os.PathLike[str]) -> AdapterPlan:
    """Plan an adapter read from `path`; raise ValueError unless the model has all its targets, with the same bases."""
    try:
        plan = make_plan(model, content.config, adapter_name, content.stored, content)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {error}") from None
    whole = plan.saved
    for name, tensor in whole.items():
        if tensor.is_meta:
            raise ValueError(
                f"{path} trains {name} in full, which is on the meta device here, where its values would be lost: load "
                "the model's values first"
            )
        given = content.saved[name]
        if tensor.shape != given.shape:
            shapes = f"{tuple(tensor.shape)} in the model and {tuple(given.shape)} in the file"
            raise ValueError(f"{path} does not fit this {type(model).__name__}: {name} is {shapes}")
        if tensor.is_floating_point() != given.is_floating_point():
            raise ValueError(f"{path}: {name} is {given.dtype}, in the model {tensor.dtype}")
    # A buffer, such as a mask, may hold infinity.
    check_finite(path, {name: content.saved[name] for name, old in whole.items() if isinstance(old, nn.Parameter)})
    spec = plan.bases.spec
    if content.spec != spec:
        raise ValueError(f"{path}: its bases are {content.spec}, but this model and its configuration need {spec}")
    arguments = (path, content.bases_checksum, plan.bases)
    if not plan.bases.is_drawn and all(weight_of(candidate).is_meta for candidate in plan.candidates):
        return dataclasses.replace(plan, check_later=partial(LaterCheck, *arguments))
    check_bases(*arguments)
    return plan
