"""Plan first, change second: `plan` says what would be adapted, `inject` does it, `remove` takes it back."""

from __future__ import annotations

import math
import re
import warnings

import torch
from torch import Tensor, nn

from randlora_vision.bases import Bases, BasesSpec, get_bases
from randlora_vision.config import RandLoRAConfig
from randlora_vision.files.adapter_file import file_bytes
from randlora_vision.injection.candidates import TRANSPOSED, Candidate
from randlora_vision.injection.record import (
    AdapterRecord,
    ModelRecord,
    check_root,
    count_base,
    drop_record,
    make_record,
    own_record,
    records,
    unwrap,
)
from randlora_vision.injection.selection import select
from randlora_vision.injection.sizing import bases_spec
from randlora_vision.injection.trained_in_full import find_saved, install_saved, own_saved
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules, is_quantized
from randlora_vision.layers.peft_around import plain_name
from randlora_vision.layers.state import ParameterState, Slot
from randlora_vision.layers.swap import adapt_module, adapted_class, base_class, restore_module
from randlora_vision.names import PARTS, is_adapter_name, parameter_name
from randlora_vision.report import InjectionReport, Target


def plan(model: nn.Module, config: RandLoRAConfig, adapter_name: str = "default") -> InjectionReport:
    """What `inject` would adapt, without touching the model.

    Raises:
        ValueError: As `inject` does.
    """
    check_root(model)
    return plan_adapter(unwrap(model), config, adapter_name)[0]


def inject(model: nn.Module, config: RandLoRAConfig, adapter_name: str = "default") -> InjectionReport:
    """Add an adapter to a model, in place. The model's output does not change until the adapter is trained.

    Every parameter is frozen except lambda and gamma of the trainable active adapters and `modules_to_save`;
    `remove` restores the flags. The new adapter joins those that are active: with `set_active` choose others.

    Args:
        model: Any module. Inject before wrapping it in DistributedDataParallel.
        config: The adapter's settings.
        adapter_name: Letters, digits, ``_`` and ``-``.

    Returns:
        What was adapted, what was skipped and why, trained numbers, and the size of the file to come.

    Raises:
        ValueError: If the name is taken or malformed, nothing matches (the message lists what the model has), a
            named layer is narrower than its rank, or `modules_to_save` names something that is not there. The
            model is untouched then.
    """
    return add_adapter(model, config, adapter_name, trainable=True)


def add_adapter(
    model: nn.Module, config: RandLoRAConfig, adapter_name: str, trainable: bool, given: Bases | None = None
) -> InjectionReport:
    """`inject`, with lambda and gamma frozen unless `trainable`, and with `given` bases if they came with a file."""
    check_root(model)
    model = unwrap(model)
    report, chosen, spec = plan_adapter(model, config, adapter_name, given)
    _check_classes(chosen)
    for warning in report.warnings if trainable else ():
        warnings.warn(warning, stacklevel=3)

    record = make_record(model)
    for parameter_path, parameter in model.named_parameters():
        if not is_adapter_name(parameter_path) and not _in_training(record, parameter_path):
            parameter.requires_grad = False  # lazy parameters know no requires_grad_
    bases = given or get_bases(spec)
    for candidate, target in zip(chosen, report.targets, strict=True):
        slot = Slot(target.rank, target.bases, target.alpha, config.dropout, bases, trainable, config.compute)
        _add_slot(candidate, target, slot, config.init, adapter_name, record.enabled)
    adapter = record.adapters[adapter_name] = AdapterRecord(config, spec, report.targets, trainable)
    own_saved(model, record, adapter)
    record.active = (*record.active, adapter_name)
    install_saved(model, record)
    return report


def remove(model: nn.Module) -> None:
    """Take every adapter off a model and give parameters their `requires_grad` back.

    Unless adapters are merged, the model is bit for bit what it was before `inject`, modules trained in full
    (`modules_to_save`) included. Merged adapters stay in the weights, as do the modules trained with them: `merge`
    then `remove` leaves a plain model without any trace of this library.

    Raises:
        ValueError: If the model has no adapters.
    """
    model = unwrap(model)
    for _, root, record in records(model):
        record.active, record.enabled = (), True
        install_saved(root, record)
        for name in list(record.adapters):
            _drop_slots(root, name)
        for path, parameter in root.named_parameters():
            parameter.requires_grad = record.requires_grad.get(plain_name(path), parameter.requires_grad)
        drop_record(root)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter off a model. Deleting the last one is `remove`.

    Raises:
        ValueError: If there is no such adapter or it is merged.
    """
    model = unwrap(model)
    owners = [(root, record) for _, root, record in records(model) if adapter_name in record.adapters]
    if not owners:
        known = {name for _, _, record in records(model) for name in record.adapters}
        raise ValueError(f"no adapter {adapter_name!r}; this model has: {', '.join(sorted(known))}")
    for root, record in owners:
        if adapter_name in record.merged:
            raise ValueError(f"adapter {adapter_name!r} is merged into the weights: unmerge it first")
        if len(record.adapters) == 1:
            remove(root)
            continue
        record.active = tuple(name for name in record.active if name != adapter_name)
        install_saved(root, record)
        _drop_slots(root, adapter_name)
        del record.adapters[adapter_name]


def plan_adapter(
    model: nn.Module, config: RandLoRAConfig, adapter_name: str, given: Bases | None = None
) -> tuple[InjectionReport, list[Candidate], BasesSpec]:
    """The report, the candidates behind its targets in the same order, and the bases they need."""
    if not isinstance(config, RandLoRAConfig):
        raise ValueError(f"config must be a RandLoRAConfig, got {type(config).__name__}")
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", adapter_name):
        raise ValueError(f"adapter_name must consist of letters, digits, '_' and '-', got {adapter_name!r}")
    record = own_record(model)
    if record is not None and adapter_name in record.adapters:
        raise ValueError(f"the model already has an adapter {adapter_name!r}: choose another name or delete it first")
    chosen, skipped, notes = select(model, config)
    targets = tuple(_target(candidate, config) for candidate in chosen)
    spec = bases_spec(config, targets, given)
    if config.dropout:
        deaf = [target.name for target in targets if target.kind not in ("linear", "quantized")]
        if deaf:
            notes.append(f"dropout does not act on weights that are read, not called: {', '.join(deaf[:3])}, ...")
    saved = find_saved(model, config.modules_to_save)
    report = InjectionReport(
        adapter_name=adapter_name,
        config=config,
        targets=targets,
        skipped=tuple(skipped),
        saved=tuple((path, tensor.numel()) for path, tensor in saved.items()),
        saved_parameters=sum(tensor.numel() for tensor in saved.values() if isinstance(tensor, nn.Parameter)),
        warnings=tuple(notes),
        base_parameters=count_base(model),
        bases_bytes=(given or get_bases(spec)).bytes_in(_products_dtype(chosen)),
        file_bytes=file_bytes(config, spec, targets, _file_dtype(chosen), saved),
    )
    return report, chosen, spec


def _target(candidate: Candidate, config: RandLoRAConfig) -> Target:
    assert candidate.shape is not None
    rank = config.rank_of(candidate.paths)
    bases = math.ceil(min(candidate.shape) / rank)
    return Target(
        candidate.name,
        candidate.kind,
        candidate.shape,
        rank,
        config.alpha_of(candidate.paths),
        bases,
        candidate.aliases,
    )


def _add_slot(candidate: Candidate, target: Target, slot: Slot, init: str, adapter_name: str, enabled: bool) -> None:
    first, param = candidate.owners[0]
    state = first._randlora.get(param) if isinstance(first, AdaptedModule) else None
    if state is None:
        state = ParameterState(*target.shape, enabled=enabled, transposed=target.kind == TRANSPOSED)
    state.slots[adapter_name] = slot
    state.active = (*state.active, adapter_name)
    weight = _weight(candidate)
    start = (0.0, 1 / max(target.bases, target.narrow))
    if init == "gamma-zero":
        start = (1 / max(target.rank, target.bases), 0.0)
    shapes = ((target.rank, target.bases), (target.bases, target.narrow))
    tensors = [
        nn.Parameter(torch.full(shape, value, dtype=_master(weight), device=weight.device), slot.trainable)
        for shape, value in zip(shapes, start, strict=True)
    ]
    for module, owned in candidate.owners:
        adapt_module(module, owned, state)
        for part, tensor in zip(PARTS, tensors, strict=True):
            module.register_parameter(parameter_name(owned, part, adapter_name), tensor)


def _weight(candidate: Candidate) -> Tensor:
    """The frozen weight; of a parametrised one, any tensor that it is computed from."""
    module, param = candidate.owners[0]
    weight = module._parameters.get(param)
    return next(module.parameters()) if weight is None else weight


def _master(weight: Tensor) -> torch.dtype:
    """Dtype of lambda and gamma: float32 whatever the base's, float64 for a float64 base."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _products_dtype(chosen: list[Candidate]) -> torch.dtype:
    """The widest dtype that matrix products of the adapted weights run in, packed ones taken for float32."""
    dtypes = {weight.dtype for weight in map(_weight, chosen)}
    return max(
        (d if d.is_floating_point and d.itemsize > 1 else torch.float32 for d in dtypes), key=lambda d: d.itemsize
    )


def _file_dtype(chosen: list[Candidate]) -> torch.dtype:
    """Dtype of lambda and gamma in the file, where all have one."""
    dtypes = {_master(_weight(candidate)) for candidate in chosen}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_classes(chosen: list[Candidate]) -> None:
    """Make every class that the injection will need; raise ValueError for one that cannot be extended."""
    for candidate in chosen:
        for module, param in candidate.owners:
            params = tuple(sorted({*module.__dict__.get("_randlora", ()), param}))
            try:
                adapted_class(base_class(module), params, is_quantized(module))
            except TypeError as error:
                name = type(module).__name__
                raise ValueError(f"{candidate.name}: its class {name} cannot be extended ({error})") from error


def _drop_slots(root: nn.Module, adapter_name: str) -> None:
    for _, module, param, state in list(adapted_modules(root)):
        for part in PARTS:
            module._parameters.pop(parameter_name(param, part, adapter_name), None)
        state.active = tuple(name for name in state.active if name != adapter_name)
        if not set(state.slots) - {adapter_name}:
            restore_module(module, param)
    for _, _, _, state in adapted_modules(root):
        state.slots.pop(adapter_name, None)


def _in_training(record: ModelRecord, path: str) -> bool:
    """True for a module trained in full by an adapter that is already there."""
    return record.installed.get(path) is not None
