"""Exchange with PEFT: export adapters to its format, and convert live PEFT models.

PEFT's folders are read by the library itself: ``randlora_vision.load_adapter(model, folder)``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_vision.adapters.checkpoint import install, own_adapter, plan_for
from randlora_vision.adapters.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, from_tensors
from randlora_vision.bases import get_bases
from randlora_vision.bases.structured import STRUCTURED
from randlora_vision.config import RandLoRAConfig
from randlora_vision.files.atomic import replacing, write_text
from randlora_vision.injection.control import set_active
from randlora_vision.injection.record import unwrap
from randlora_vision.injection.sizing import peft_sizes
from randlora_vision.names import matches_one_of, matches_suffix, with_parents
from randlora_vision.report import Target

_SEED_ONLY = {"peft": {}, "peft_sparse": {"sparse": True}, "peft_very_sparse": {"very_sparse": True}}
"""Bases that PEFT draws from its key, with its settings. Float16 bases depend on the hardware and are stored."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Containers that PEFT does not accept as `modules_to_save`: the modules in them are named instead."""


def export(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained(base, directory)` loads.

    The bases are written once. PEFT warns that the copies of the other layers are missing, but all layers share one
    copy, so nothing is lost. For adapters with PEFT's own generator (``bases="peft"``, ``"peft_sparse"``,
    ``"peft_very_sparse"``), only the key is written and PEFT draws the bases again: dense ones in bfloat16 where the
    hardware supports it. Run-time scales (`set_scale`) are not written.

    Modules trained in full become PEFT's `modules_to_save` where PEFT can find them by name. Single parameters and
    biases are written under their own names, and PEFT's loader copies them into the base model.

    Args:
        model: The module that `inject` was called on.
        directory: Created if needed. Two files are written: adapter_config.json and adapter_model.safetensors.
        adapter_name: Name of the adapter.

    Returns:
        The folder.

    Raises:
        ValueError: If PEFT's RandLora cannot express the adapter, such as one with structured bases, the default; the
            message names every such target.
    """
    model = unwrap(model)
    adapter, trained, saved = own_adapter(model, adapter_name)
    _check_expressible(model, adapter.targets, adapter.config)
    sizes, alpha = peft_sizes(adapter.targets), adapter.targets[0].alpha
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        lam, gamma = trained[target.name]
        # PEFT has one alpha for all layers: lambda absorbs the difference.
        tensors[f"{PREFIX}{target.name}.randlora_lambda"] = lam * (target.alpha / alpha)
        tensors[f"{PREFIX}{target.name}.randlora_gamma"] = gamma
    flags = _SEED_ONLY.get(adapter.spec.kind)
    if flags is None:
        cpu, bases = torch.device("cpu"), get_bases(adapter.spec)
        a = _sized(bases.a(cpu, torch.float32), sizes["rank"], sizes["narrow"])
        b = _sized(bases.b(cpu, torch.float32), sizes["wide"], sizes["columns"])
        tensors["base_model.randlora_A"] = a[:, None]
        tensors["base_model.randlora_B"] = b.unflatten(1, (-1, sizes["rank"]))
    names = [target.name for target in adapter.targets]
    modules = _modules_to_save(model, adapter.config, saved, names)
    for path, tensor in saved.items():
        parent, _, last = path.rpartition(".")
        inside = f"{parent}.base_layer.{last}" if parent in names else path
        tensors[PREFIX + inside] = tensor
    settings = {
        "peft_type": "RANDLORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": sizes["rank"],
        "randlora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "randlora_dropout": adapter.config.dropout,
        "target_modules": _target_modules(model, names),
        "projection_prng_key": adapter.spec.seed,
        "save_projection": flags is None,
        "sparse": False,
        "very_sparse": False,
        "fan_in_fan_out": all(target.kind == "transposed" for target in adapter.targets),
        "bias": "none",
        "modules_to_save": modules or None,
        "init_weights": True,
        **(flags or {}),
    }
    return _write(Path(directory), tensors, settings)


def from_peft(peft_model: nn.Module, trainable: bool = False) -> nn.Module:
    """Return the base model of a live PEFT model, with its RandLora adapters injected in place under the same names.

    The PEFT model is unloaded, as with its `unload`. The same adapters are active afterwards. Biases that PEFT
    trained (``bias="all"``) have already replaced those of the base model: the untrained ones are lost, as in PEFT.

    Args:
        peft_model: A `peft.PeftModel` with RandLora adapters.
        trainable: True to train the adapters further.

    Returns:
        The base model: the object that was passed to PEFT.

    Raises:
        ValueError: If `peft_model` is not such a model, an adapter is merged, or a layer shares its weight with
            another one, so that it cannot be adapted in place. The PEFT model is then unchanged.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.randlora import RandLoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(peft_model, PeftModel):
        raise ValueError(f"expected a peft.PeftModel, got {type(peft_model).__name__}")
    wrong = [name for name, config in peft_model.peft_config.items() if config.peft_type != "RANDLORA"]
    if wrong:
        raise ValueError(f"expected only RandLora adapters, but these have another PEFT type: {', '.join(wrong)}")
    layers = {path: module for path, module in peft_model.named_modules() if isinstance(module, RandLoraLayer)}
    if any(layer.merged for layer in layers.values()):
        raise ValueError("adapters are merged into the weights: call unmerge_adapter() on the PEFT model first")
    uses = Counter(id(parameter) for _, parameter in peft_model.named_parameters(remove_duplicate=False))
    shared = [path for path, layer in layers.items() if uses[id(layer.get_base_layer().weight)] > 1]
    if shared:
        raise ValueError(
            f"the weights of {', '.join(shared)} are shared with other layers and cannot be adapted in place: "
            "untie them before the model is passed to PEFT"
        )
    found = {}
    for name, config in peft_model.peft_config.items():
        state = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
        state = {key: tensor for key, tensor in state.items() if not key.endswith((".randlora_A", ".randlora_B"))}
        holder = next(layer for layer in layers.values() if name in layer.randlora_lambda)
        state["base_model.randlora_A"] = holder.randlora_A[name]
        state["base_model.randlora_B"] = holder.randlora_B[name]
        tensors = {key: tensor.detach().clone() for key, tensor in state.items()}
        found[name] = from_tensors(f"adapter {name!r}", _plain(config.to_dict()), list(tensors), tensors.__getitem__)
    active = list(peft_model.base_model.active_adapters)
    whole = {
        path.removeprefix(PREFIX): module.original_module
        for path, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model = peft_model.unload()
    for path, module in whole.items():
        model.set_submodule(path, module)
    for name, content in found.items():
        fitted = content.fit(model)
        install(plan_for(model, fitted, name, content.source), fitted, trainable)
    set_active(model, active)
    return model


def _check_expressible(model: nn.Module, targets: tuple[Target, ...], config: RandLoRAConfig) -> None:
    """Raise one ValueError that lists everything PEFT's RandLora cannot express."""
    reasons: dict[str, list[str]] = {}
    attentions = {path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    for target in targets:
        reason = None
        if target.kind not in ("linear", "transposed", "quantized"):
            reason = f"{target.kind} weights"
        elif target.name.endswith("out_proj") and target.name.rpartition(".")[0] in attentions:
            reason = "projections that their attention never calls, so PEFT's wrapper has no effect"
        elif target.aliases:
            reason = "weights with several names or owners"
        elif target.rank != targets[0].rank:
            reason = f"ranks other than the first target's {targets[0].rank}"
        if reason:
            reasons.setdefault(reason, []).append(target.name)
    if config.bases == STRUCTURED:
        why = "structured bases, which need a different B for each layer shape (for PEFT, train with bases='uniform')"
        reasons[why] = ["all targets"]
    if reasons:
        listed = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
        raise ValueError(f"PEFT's RandLora cannot express {listed}")


def _sized(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Crop or pad the matrix to the size that PEFT expects. The padding is never read."""
    matrix = matrix[:rows, :columns]
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names, or a regular expression if PEFT, which matches the ends of paths, would match more modules by them."""
    hits = {path for path, _ in model.named_modules() if any(matches_suffix(name, path) for name in names)}
    return sorted(names) if hits == set(names) else "|".join(re.escape(name) for name in sorted(names))


def _modules_to_save(
    model: nn.Module, config: RandLoRAConfig, saved: Mapping[str, Tensor], names: Iterable[str]
) -> list[str]:
    """Paths of the modules trained in full, as PEFT matches them; empty if PEFT would match other modules too."""
    modules: list[str] = []
    wanted = frozenset(config.modules_to_save)
    for path, module in model.named_modules():
        keys = [f"{path}.{key}" for key in module.state_dict()]
        asked = matches_one_of(wanted, with_parents((path,)))
        inside = any(path.startswith(f"{outer}.") for outer in modules)
        if isinstance(module, _CONTAINERS) or not (path and asked and keys) or inside:
            continue
        if all(key in saved for key in keys):
            modules.append(path)
    everything = [path for path, _ in model.named_modules(remove_duplicate=False)]
    found = [path for path in everything if any(path.endswith(module) for module in modules)]
    lost = any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules for name in names)
    return modules if sorted(found) == sorted(modules) and not lost else []


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings as they appear in its file: sets become lists."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _write(directory: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    values = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    values = {
        name: (tensor.float() if tensor.dtype == torch.float64 and "randlora_" in name else tensor).contiguous().clone()
        for name, tensor in values.items()
    }
    with replacing(directory / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(safetensors.torch.save(values, {"format": "pt"}))
    write_text(directory / CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return directory
