"""Saving an adapter to one small .safetensors file, and loading it into a base model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision.adapters import peft_folder
from randlora_vision.bases import get_bases
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.untrusted import check_finite
from randlora_vision.injection.changes import holders, lost_message
from randlora_vision.injection.inject import add_adapter
from randlora_vision.injection.plan import AdapterPlan, make_plan
from randlora_vision.injection.record import AdapterRecord, check_names, own_record, records, unwrap
from randlora_vision.injection.trained_in_full import current_saved
from randlora_vision.layers.adapted import AdaptedModule
from randlora_vision.report import InjectionReport


def save_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter's lambda, gamma and `modules_to_save`; the bases are stored as their seed.

    Args:
        model: The module that `inject` was called on (bare, compiled, or in DistributedDataParallel).
        path: A name ending in ``.safetensors``; missing folders are created. The file is written atomically.
        adapter_name: The adapter to save.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no such adapter or the name does not end in ``.safetensors``.
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
    sha256 = get_bases(adapter.spec).sha256
    return adapter_file.pack(adapter.config, adapter.spec, sha256, adapter.targets, tensors, saved)


def own_adapter(
    model: nn.Module, adapter_name: str
) -> tuple[AdapterRecord, dict[str, tuple[nn.Parameter, nn.Parameter]], dict[str, Tensor]]:
    """Return an adapter's record, target name -> (lambda, gamma), and its tensors trained in full by path.

    Targets that a host has removed from the model are left out, with a warning.

    Raises:
        ValueError: If the model has no such adapter, it was injected into another module, it is on the meta device, or
            all its targets are gone.
    """
    model = unwrap(model)
    record = own_record(model)
    if record is None:
        where = records(model)[0][0]
        raise ValueError(f"the adapters were injected into {where!r}: pass that module to save_adapter")
    check_names(model, adapter_name)
    found = holders(model, record, adapter_name)
    tensors = {name: held[0].adapter_tensors(held[1], adapter_name) for name, held in found.items() if held is not None}
    adapter = record.adapters[adapter_name]
    if len(tensors) < len(found):
        lost = lost_message([name for name, held in found.items() if held is None])
        if not tensors:
            raise ValueError(f"nothing is left of adapter {adapter_name!r}: {lost}")
        warnings.warn(f"{lost}; the other {len(tensors)} targets are saved", stacklevel=4)
        adapter = dataclasses.replace(adapter, targets=tuple(t for t in adapter.targets if t.name in tensors))
    if any(tensor.is_meta for pair in tensors.values() for tensor in pair):
        raise ValueError(f"adapter {adapter_name!r} is on the meta device and has no values to save")
    return adapter, tensors, current_saved(model, record, adapter_name)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    trainable: bool = False,
    peft_dtype: torch.dtype = torch.bfloat16,
) -> InjectionReport:
    """Add the adapter in a file to its base model; everything is checked before the model is changed.

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
            model, or its bases cannot be reproduced. The model is then left unchanged.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no adapter file {str(path)!r}")
    model = unwrap(model)
    content = peft_folder.read(source, peft_dtype).fit(model) if source.is_dir() else adapter_file.read(source)
    return install(plan_for(model, content, adapter_name, source), content, trainable)


def install(plan: AdapterPlan, content: AdapterFile, trainable: bool) -> InjectionReport:
    """Carry out a plan of `plan_for` and copy the trained values."""
    add_adapter(plan, trainable)
    model, name = plan.model, plan.report.adapter_name
    record = own_record(model)
    assert record is not None
    with torch.no_grad():
        for candidate in plan.candidates:
            module, param = candidate.owners[0]
            assert isinstance(module, AdaptedModule)
            for tensor, value in zip(module.adapter_tensors(param, name), content.trained[candidate.name], strict=True):
                tensor.copy_(value)
        for path, whole in current_saved(model, record, name).items():
            whole.copy_(content.saved[path])
    return dataclasses.replace(plan.report, warnings=(*plan.report.warnings, *content.notes))


def plan_for(model: nn.Module, content: AdapterFile, adapter_name: str, path: str | os.PathLike[str]) -> AdapterPlan:
    """Make the plan of an adapter that was read from `path`.

    Raises:
        ValueError: Unless the model has exactly the targets of the file, and the bases are the same.
    """
    try:
        plan = make_plan(model, content.config, adapter_name, content.stored)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {error}") from None
    if any(
        tensor.is_meta
        for candidate in plan.candidates
        for module, _ in candidate.owners
        for tensor in module.parameters()
    ):
        raise ValueError(f"{path} cannot be loaded on the meta device, where its values would be lost")
    have, want = (
        {target.name: (target.shape, target.rank, target.alpha) for target in targets}
        for targets in (plan.report.targets, content.targets)
    )
    whole = plan.saved
    saved = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in content.saved.items()}
    pairs: list[tuple[Mapping[str, object], Mapping[str, object]]] = [(have, want), (saved, stored)]
    for present, expected in pairs:
        compare(present, expected, f"{path} does not fit this {type(model).__name__}")
    for name, tensor in whole.items():
        if tensor.is_floating_point() != content.saved[name].is_floating_point():
            raise ValueError(f"{path}: {name} is {content.saved[name].dtype}, in the model {tensor.dtype}")
    # A buffer, such as a mask, may hold infinity.
    check_finite(path, {name: content.saved[name] for name, old in whole.items() if isinstance(old, nn.Parameter)})
    spec = plan.bases.spec
    if content.spec != spec:
        raise ValueError(f"{path}: its bases are {content.spec}, but this model and its configuration need {spec}")
    made = plan.bases.sha256
    if made != content.bases_sha256:
        raise ValueError(
            f"{path}: the bases made from seed {spec.seed} are not those that the adapter was trained with "
            f"(SHA-256 {made[:12]}..., expected {content.bases_sha256[:12]}...)"
        )
    return plan


def compare(have: Mapping[str, object], want: Mapping[str, object], prefix: str) -> None:
    """Raise ValueError, starting with `prefix`, unless a model has exactly what a file holds."""
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in (
                (missing, "of the file's targets are not in the model"),
                (extra, "of the model's targets are not in the file"),
            )
            if names
        ]
        raise ValueError(f"{prefix}: {' and '.join(parts)}")
    for name, expected in want.items():
        if have[name] != expected:
            raise ValueError(f"{prefix}: {name} is {have[name]} in the model and {expected} in the file")
