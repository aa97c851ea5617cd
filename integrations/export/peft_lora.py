"""Write a LoRA folder for PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT adapts the two projections of an `nn.MultiheadAttention` together, with one rank: a projection that is not adapted
is filled with zeros, and the smaller rank is padded with zeros. PEFT also adds the update of the second projection,
`out_proj`, twice (up to 0.21 at least), so the file holds the update divided by the factor that is measured with the
installed PEFT.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_vision.files.atomic import replacing, write_json
from randlora_vision.integrations.export.lora_keys import low_rank_problem, refuse
from randlora_vision.integrations.export.low_rank import Choice, ExportReport, LayerError, factorize, layer_error
from randlora_vision.integrations.export.updates import Update, components

_ROOT = "base_model.model"


class _Factors(NamedTuple):
    """The two layers of a LoRA: up (O, r, 1...) and down (r, I...)."""

    up: Tensor
    down: Tensor


def write_peft(
    host: Any,
    folder: Path,
    found: Sequence[Update],
    whole: Mapping[tuple[str, str], Tensor],
    choice: Choice,
    progress: Callable[[int, int], None] | None,
) -> ExportReport:
    """Write the updates as a PEFT folder; see `export_lora`.

    Args:
        host: The model, or a pipeline with one adapted component.
        folder: Folder for the two files.
        found: The updates.
        whole: (component, path) -> tensor of the modules trained in full.
        choice: Rank or energy.
        progress: Called after each layer.

    Raises:
        ValueError: If PEFT cannot express an adapted layer or a module trained in full.
    """
    adapted = sorted({update.component for update in found} | {component for component, _ in whole})
    if len(adapted) > 1:
        raise ValueError(f"a PEFT folder is for one model: export {', '.join(adapted)} separately")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the format 'peft' needs a folder, but {str(folder)!r} is a file")
    model = components(host)[adapted[0]]
    refuse(found, "peft", lambda update: _problem(model, update))
    saved_modules = _saved_modules(model, [path for _, path in whole])

    factors: dict[str, _Factors] = {}
    layers: list[LayerError] = []
    for done, update in enumerate(found, start=1):
        delta = update.delta()
        flat = delta.flatten(1)
        up, down = factorize(flat, choice)
        layers.append(layer_error(update.name, flat, up @ down, up.shape[1]))
        kernel = (1,) * (delta.ndim - 2)
        factors[_target(model, update)] = _Factors(up.reshape(*up.shape, *kernel), down.reshape(-1, *delta.shape[1:]))
        if progress is not None:
            progress(done, len(found))
    targets = _complete_attentions(model, factors)
    tensors: dict[str, Tensor] = {f"{_ROOT}.{path}": tensor.detach() for (_, path), tensor in whole.items()}
    for name, (up, down) in factors.items():
        tensors[f"{_ROOT}.{name}.lora_A.weight"] = down
        tensors[f"{_ROOT}.{name}.lora_B.weight"] = up
    report = ExportReport("peft", str(folder), choice, tuple(layers))
    with replacing(folder / "adapter_model.safetensors") as temporary:
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(on_cpu, temporary, report.metadata())
    ranks = {name: factors[name].up.shape[1] for name in targets}
    write_json(folder / "adapter_config.json", _config(ranks, saved_modules))
    return report


def _config(ranks: Mapping[str, int], saved_modules: list[str]) -> dict[str, Any]:
    """The adapter configuration: alpha equals the rank in every layer, so that the update is B A."""
    common = collections.Counter(ranks.values()).most_common(1)[0][0]
    # Anchored and escaped: PEFT treats keys as regular expressions for the end of a path.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "modules_to_save": saved_modules or None,
    }


def _problem(model: nn.Module, update: Update) -> str | None:
    if isinstance(update.module, nn.MultiheadAttention):
        return None if update.param == "in_proj_weight" else "PEFT needs attention with one packed projection"
    attention = _attention(model, update.path)
    if attention is not None and not attention._qkv_same_embed_dim:
        return "PEFT needs attention with one packed projection"
    return low_rank_problem(update)


def _attention(model: nn.Module, path: str) -> nn.MultiheadAttention | None:
    """The attention that has this output projection; PEFT can only adapt the projection through the attention."""
    parent, _, last = path.rpartition(".")
    module = model.get_submodule(parent)
    return module if last == "out_proj" and isinstance(module, nn.MultiheadAttention) else None


def _target(model: nn.Module, update: Update) -> str:
    """The path of a layer's LoRA in PEFT."""
    if _attention(model, update.path):
        return f"{update.path.removesuffix('.out_proj')}.base_layer.out_proj"
    return update.path


def _complete_attentions(model: nn.Module, factors: dict[str, _Factors]) -> list[str]:
    """Give both projections of every attention a LoRA of the same rank, and return the target modules for PEFT."""
    targets = []
    for name in list(factors):
        owner = name.removesuffix(".base_layer.out_proj")
        module = model.get_submodule(owner)
        if not isinstance(module, nn.MultiheadAttention):
            targets.append(name)
            continue
        if owner in targets:
            continue
        targets.append(owner)
        both = (owner, f"{owner}.base_layer.out_proj")
        width = module.embed_dim
        if both[1] in factors:
            factors[both[1]] = factors[both[1]]._replace(up=factors[both[1]].up / _times_added())
        given = [factors[key] for key in both if key in factors]
        rank = max(factor.up.shape[1] for factor in given)
        like = given[0].up
        for key, rows in zip(both, (3 * width, width), strict=True):
            up, down = factors.get(key) or _Factors(like.new_zeros(rows, 0), like.new_zeros(0, width))
            missing = rank - up.shape[1]
            factors[key] = _Factors(F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing)))
    return targets


@functools.cache
def _times_added() -> int:
    """The number of times that the installed PEFT adds the update of an attention's output projection."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("the format 'peft' needs PEFT to export an attention's out_proj: pip install peft") from None
    host = nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)})
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["attention"]), host)
    attention: Any = host["attention"]
    weight = attention.base_layer.out_proj.base_layer.weight.item()
    for name, parameter in attention.named_parameters():
        if ".out_proj.lora_" in name:
            nn.init.ones_(parameter)
    attention.merge()
    return round(attention.base_layer.out_proj.base_layer.weight.item() - weight)


def _saved_modules(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules that consist of the tensors trained in full; PEFT can only save whole modules."""
    owners = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    for owner in owners:
        module = model.get_submodule(owner)
        own = {f"{owner}.{name}".lstrip(".") for name in module.state_dict()}
        if not owner or not own <= set(paths):
            parts = ", ".join(path for path in paths if path.rpartition(".")[0] == owner)
            raise ValueError(f"PEFT can only train whole modules in full, not {parts} alone (modules_to_save)")
        ending = [path for path, _ in model.named_modules() if path.endswith(owner) and path != owner]
        if ending:
            raise ValueError(f"PEFT would also save {ending[0]!r}: it matches modules_to_save by suffix ({owner!r})")
    return owners
