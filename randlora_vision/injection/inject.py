"""Planning, injecting and removing: `plan` reports what would be adapted, `inject` does it, `remove` undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from randlora_vision.config import RandLoRAConfig
from randlora_vision.injection.candidates import TRANSPOSED, Candidate
from randlora_vision.injection.held import refuse_held_adapters, refuse_offloaded_tensors
from randlora_vision.injection.host_calls import unwatch_calls, watch_calls
from randlora_vision.injection.offloaded import hide_new_adapters, offloaded_modules
from randlora_vision.injection.plan import AdapterPlan, make_plan, master_dtype, weight_of
from randlora_vision.injection.record import (
    AdapterRecord,
    ModelRecord,
    check_names,
    drop_record,
    make_record,
    own_record,
    records,
    refuse_in_block,
    refuse_merged,
    unwrap,
)
from randlora_vision.injection.trained_in_full import install_saved, own_saved
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules, base_parameters, is_quantized
from randlora_vision.layers.peft_around import plain_name, watch_hosts
from randlora_vision.layers.state import AdapterSlot, ParameterState, Switches
from randlora_vision.layers.swap import adapt_module, adapted_class, base_class, restore_module
from randlora_vision.names import PARTS, parameter_name
from randlora_vision.report import InjectionReport, Target


def plan(model: nn.Module, config: RandLoRAConfig, adapter_name: str = "default") -> InjectionReport:
    """Report what `inject` would adapt, without changing the model.

    Raises:
        ValueError: Under the conditions of `inject`.
    """
    return make_plan(model, config, adapter_name).report


def inject(model: nn.Module, config: RandLoRAConfig, adapter_name: str = "default") -> InjectionReport:
    """Add an adapter to a model in place; the model's output does not change until the adapter is trained.

    Every parameter is frozen except lambda and gamma of the trainable active adapters and `modules_to_save`;
    `remove` restores the flags. The new adapter is added to the active ones; use `set_active` to choose others.

    Args:
        model: Any module. Inject before wrapping it in DistributedDataParallel.
        config: The adapter's settings.
        adapter_name: A name of letters, digits, ``_`` and ``-``.

    Returns:
        What was adapted, what was skipped and why, the number of trained parameters, and the size of the adapter file.

    Raises:
        ValueError: If the name is taken or malformed, nothing matches (the message lists what the model has), a
            named layer is narrower than its rank, `modules_to_save` names something that does not exist, or a host
            holds the weights in a way that has no place for new parameters (FSDP, DeepSpeed ZeRO-3, offloaded groups,
            inference tensors). The model is then left unchanged.
    """
    plan = make_plan(model, config, adapter_name)
    add_adapter(plan, trainable=True)
    return plan.report


@torch.inference_mode(False)  # parameters made in inference mode could not be trained later
def add_adapter(plan: AdapterPlan, trainable: bool, valued: bool = False) -> None:
    """Carry out a plan, with lambda and gamma frozen unless `trainable`.

    Args:
        plan: The plan.
        trainable: True to train the adapter.
        valued: True if values for lambda and gamma follow: they are then never on the meta device.

    Raises:
        ValueError: If a module's class cannot be extended, or a host holds its weights in a way that has no place for
            new parameters. The model is then left unchanged.
    """
    _check_classes(plan.candidates)
    _check_weights(plan, trainable)
    for warning in plan.report.warnings if trainable else ():
        warnings.warn(warning, stacklevel=3)
    watch_hosts()
    model, report = plan.model, plan.report
    config, adapter_name = report.config, report.adapter_name
    if own_record(model) is None:
        watch_calls(model)
    record = make_record(model)
    for parameter_path, parameter in base_parameters(model):
        if not _in_training(record, parameter_path):
            parameter.requires_grad = False  # lazy parameters do not support requires_grad_
    offloaded = offloaded_modules(model)
    for candidate, target in zip(plan.candidates, report.targets, strict=True):
        start = (0.0, 1 / max(target.bases, target.narrow))
        if config.init == "gamma-zero":
            start = (1 / max(target.rank, target.bases), 0.0)
        slot = AdapterSlot(
            target.rank, target.bases, target.alpha, config.dropout, plan.bases, trainable, start, config.compute
        )
        hosts = [offloaded[module] for module, _ in candidate.owners if module in offloaded]
        device = hosts[0].device if hosts else weight_of(candidate).device
        if valued and device.type == "meta":
            device = torch.device("cpu")
        for host in hosts:
            hide_new_adapters(host.hook)
        _add_slot(candidate, target, slot, device, adapter_name, record.switches, valued)
    adapter = record.adapters[adapter_name] = AdapterRecord(config, plan.bases.spec, report.targets, trainable)
    own_saved(record, adapter, plan.saved)
    record.switches.active = (*record.switches.active, adapter_name)
    install_saved(model, record)


def remove(model: nn.Module) -> None:
    """Remove all adapters from a model and restore the `requires_grad` flags of its parameters.

    Unless adapters are merged, the model is bit for bit what it was before `inject`, including modules trained in full
    (`modules_to_save`). Merged adapters stay in the weights, as do the modules trained with them: `merge` followed by
    `remove` leaves a plain model without any trace of this library.

    Raises:
        ValueError: If the model has no adapters, or a host holds their tensors (offloaded or sharded).
    """
    model = unwrap(model)
    for _, root, record in records(model):
        refuse_in_block(record, "remove adapters")
        refuse_held_adapters(root, "remove adapters")
        refuse_offloaded_tensors(root, record.installed, "remove adapters")
    for _, root, record in records(model):
        folded = [(module, param) for _, module, param, state in adapted_modules(root) if state.is_folded]
        record.switches.active, record.switches.enabled = (), True
        install_saved(root, record)
        for name in list(record.adapters):
            _drop_slots(root, name)
        for path, parameter in root.named_parameters():
            with torch.inference_mode(parameter.is_inference()):  # only there may such a tensor require a gradient
                parameter.requires_grad = record.requires_grad.get(plain_name(path), parameter.requires_grad)
        for module, param in folded:
            _fold(module, param)
        unwatch_calls(root)
        drop_record(root)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter from a model; deleting the last one is equivalent to `remove`.

    Raises:
        ValueError: If there is no such adapter, it is merged, or a host holds its tensors (offloaded or sharded).
    """
    model = unwrap(model)
    check_names(model, adapter_name)
    for root, record in [(root, record) for _, root, record in records(model) if adapter_name in record.adapters]:
        refuse_merged(record, (adapter_name,))
        refuse_in_block(record, "delete an adapter")
        refuse_held_adapters(root, "delete an adapter")
        if len(record.adapters) == 1:
            remove(root)
            continue
        record.switches.active = tuple(name for name in record.switches.active if name != adapter_name)
        install_saved(root, record)
        _drop_slots(root, adapter_name)
        del record.adapters[adapter_name]


def _add_slot(
    candidate: Candidate,
    target: Target,
    slot: AdapterSlot,
    device: torch.device,
    adapter_name: str,
    switches: Switches,
    valued: bool,
) -> None:
    first, param = candidate.owners[0]
    state = first.adapter_state(param) if isinstance(first, AdaptedModule) else None
    if state is None:
        state = ParameterState(*target.shape, switches, transposed=target.kind == TRANSPOSED)
    state.slots[adapter_name] = slot
    dtype = master_dtype(weight_of(candidate))
    shapes = ((target.rank, target.bases), (target.bases, target.narrow))
    tensors = []
    for shape, value in zip(shapes, slot.start, strict=True):
        tensor = torch.empty(shape, dtype=dtype, device=device)  # filling it would take as long as reading the values
        tensors.append(nn.Parameter(tensor if valued else tensor.fill_(value), slot.trainable))
    for module, owned in candidate.owners:
        adapt_module(module, owned, state)
        for part, tensor in zip(PARTS, tensors, strict=True):
            module.register_parameter(parameter_name(owned, part, adapter_name), tensor)


def _check_classes(chosen: Sequence[Candidate]) -> None:
    """Create every class that the injection needs; raise ValueError if one cannot be extended."""
    for candidate in chosen:
        for module, param in candidate.owners:
            params = tuple(sorted({*module.__dict__.get("_randlora", ()), param}))
            try:
                adapted_class(base_class(module), params, is_quantized(module))
            except TypeError as error:
                name = type(module).__name__
                raise ValueError(f"{candidate.name}: its class {name} cannot be extended ({error})") from error


def _check_weights(plan: AdapterPlan, trainable: bool) -> None:
    """Raise ValueError if the weights are held in a way that has no place for new parameters."""
    refuse_offloaded_tensors(plan.model, plan.saved, "train modules in full (modules_to_save)")
    for candidate in plan.candidates if trainable else ():
        if weight_of(candidate).is_inference():
            raise ValueError(
                f"cannot train an adapter of {candidate.name}: its weight was created in inference mode, and autograd "
                "cannot use it; build or load the model outside of torch.inference_mode()"
            )


def _fold(module: nn.Module, param: str) -> None:
    """Put the merged weight in the place of the parametrization that computed the weight before."""
    weight = module._parameters.pop(param)
    assert weight is not None
    weight.requires_grad = any(p.requires_grad for p in module.parametrizations[param].parameters())  # type: ignore[index, union-attr]
    if len(module.parametrizations) == 1:  # type: ignore[arg-type]
        # Deep copies share the class, from which remove_parametrizations would delete the computed weight.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
    else:
        parametrize.remove_parametrizations(module, param)
    module._parameters[param] = weight


def _drop_slots(root: nn.Module, adapter_name: str) -> None:
    for _, module, param, state in list(adapted_modules(root)):
        for part in PARTS:
            module._parameters.pop(parameter_name(param, part, adapter_name), None)
        if not set(state.slots) - {adapter_name}:
            restore_module(module, param)
    for _, _, _, state in adapted_modules(root):
        state.slots.pop(adapter_name, None)


def _in_training(record: ModelRecord, path: str) -> bool:
    """True for a parameter trained in full by an existing adapter."""
    return record.installed.get(path) is not None
