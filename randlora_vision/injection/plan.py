"""The plan of an adapter, decided in full before the model is changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from randlora_vision.bases import Bases, get_bases
from randlora_vision.config import RandLoRAConfig
from randlora_vision.files.adapter_file import AdapterFile, file_bytes
from randlora_vision.injection.candidates import Candidate
from randlora_vision.injection.held import refuse_unfit
from randlora_vision.injection.record import check_root, count_base, own_record, unwrap
from randlora_vision.injection.selection import select, select_listed
from randlora_vision.injection.sizing import bases_spec
from randlora_vision.injection.trained_in_full import find_saved, listed_saved
from randlora_vision.names import listing
from randlora_vision.report import InjectionReport


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Everything that is decided about a new adapter before the model is changed."""

    model: nn.Module  # the module that the adapter is added to
    report: InjectionReport  # the report that `inject` returns
    candidates: tuple[Candidate, ...]  # the weights of the report's targets, in the same order
    bases: Bases  # the bases that all targets share
    saved: Mapping[str, Tensor]  # path -> the model's own tensor of a module to be trained in full
    check_later: Callable[[], object] | None = None  # has the bases checked before their first use


def make_plan(
    model: nn.Module,
    config: RandLoRAConfig,
    adapter_name: str,
    given: Bases | None = None,
    content: AdapterFile | None = None,
) -> AdapterPlan:
    """Plan an adapter, or exactly the `content` of a file (`given`: its bases); raises ValueError as `inject` does."""
    check_root(model)
    model = unwrap(model)
    refuse_unfit(model, "add an adapter")
    if not isinstance(config, RandLoRAConfig):
        raise ValueError(f"config must be a RandLoRAConfig, got {type(config).__name__}")
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", adapter_name):
        raise ValueError(f"adapter_name must consist of letters, digits, '_' and '-', got {adapter_name!r}")
    record = own_record(model)
    if record is not None and adapter_name in record.adapters:
        raise ValueError(f"the model already has an adapter {adapter_name!r}: choose another name or delete it first")
    if content is None:
        chosen, skipped, notes = select(model, config)
        targets = tuple(c.target(config.rank_of(c.paths), config.alpha_of(c.paths)) for c in chosen)
        saved = find_saved(model, config.modules_to_save)
    else:
        listed = {target.name: target for target in content.targets}
        (chosen, skipped), notes = select_listed(model, listed), []
        targets = tuple(c.target(listed[c.name].rank, listed[c.name].alpha) for c in chosen)
        saved = listed_saved(model, content.saved, [weight_of(candidate) for candidate in chosen])
    spec = bases_spec(config, targets, given)
    bases = given if given is not None and given.spec == spec else get_bases(spec)
    if config.dropout:
        without = [target.name for target in targets if target.kind not in ("linear", "quantized")]
        if without:
            notes.append(f"dropout has no effect on weights that are read directly: {listing(without, 3)}")
    report = InjectionReport(
        adapter_name=adapter_name,
        config=config,
        targets=targets,
        skipped=tuple(skipped),
        saved=tuple((path, tensor.numel()) for path, tensor in saved.items()),
        saved_parameters=sum(tensor.numel() for tensor in saved.values() if isinstance(tensor, nn.Parameter)),
        warnings=tuple(notes),
        base_parameters=count_base(model),
        bases_bytes=bases.bytes_in(_products_dtype(chosen)),
        file_bytes=file_bytes(config, spec, targets, _file_dtype(chosen), saved),
    )
    return AdapterPlan(model, report, tuple(chosen), bases, saved)


def weight_of(candidate: Candidate) -> Tensor:
    """The frozen weight, or for a parametrised weight, one of the tensors that it is computed from."""
    module, param = candidate.owners[0]
    weight = module._parameters.get(param)
    return next(module.parameters()) if weight is None else weight


def master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of lambda and gamma: float64 for a float64 base, otherwise float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _products_dtype(chosen: list[Candidate]) -> torch.dtype:
    """The widest dtype of the matrix products with the adapted weights; packed weights count as float32."""
    dtypes = {weight.dtype for weight in map(weight_of, chosen)}
    return max(
        (d if d.is_floating_point and d.itemsize > 1 else torch.float32 for d in dtypes), key=lambda d: d.itemsize
    )


def _file_dtype(chosen: list[Candidate]) -> torch.dtype:
    dtypes = {master_dtype(weight_of(candidate)) for candidate in chosen}
    return torch.float64 if torch.float64 in dtypes else torch.float32
