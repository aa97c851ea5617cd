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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from randlora_vision.files.atomic import write_json
from randlora_vision.integrations.export.formats import Contents, Format, Whole, not_low_rank
from randlora_vision.integrations.export.low_rank import ExportReport, Factors
from randlora_vision.integrations.export.updates import Update, components

_ROOT = "base_model.model"


class Peft(Format):
    """A folder that ``PeftModel.from_pretrained`` loads, for one model of any kind."""

    name = "peft"
    whole_modules = True

    def check_path(self, path: Path) -> None:
        """Raise ValueError if the path is a file."""
        if path.exists() and not path.is_dir():
            raise ValueError(f"the format 'peft' needs a folder, but {str(path)!r} is a file")

    def check(self, host: Any, found: Sequence[Update], whole: Whole) -> None:
        """Raise ValueError if PEFT cannot express an adapted layer or a module trained in full."""
        adapted = sorted({update.component for update in found} | {component for component, _ in whole})
        if len(adapted) > 1:
            raise ValueError(f"a PEFT folder is for one model: export {', '.join(adapted)} separately")
        super().check(host, found, whole)
        _saved_modules(components(host)[adapted[0]], whole)

    def problem(self, host: Any, update: Update) -> str | None:
        """Return why PEFT cannot express a layer, or None."""
        packed = update.module
        if not isinstance(packed, nn.MultiheadAttention):
            packed = _attention(components(host)[update.component], update.path)
            if packed is None:
                return not_low_rank(update)
        return None if packed._qkv_same_embed_dim else "PEFT needs attention with one packed projection"

    def key(self, host: Any, update: Update) -> str:
        """Return the path of a layer's LoRA in PEFT."""
        if _attention(components(host)[update.component], update.path):
            return f"{update.path.removesuffix('.out_proj')}.base_layer.out_proj"
        return update.path

    def write(self, path: Path, model: nn.Module, contents: Contents, whole: Whole, report: ExportReport) -> None:
        """Write the two files of the folder."""
        factors = {key: part for key, part in contents.items() if isinstance(part, Factors)}
        targets = _complete_attentions(model, factors)
        tensors = {f"{_ROOT}.{name}": tensor.detach() for (_, name), tensor in whole.items()}
        for name, (up, down) in factors.items():
            tensors |= {f"{_ROOT}.{name}.lora_A.weight": down, f"{_ROOT}.{name}.lora_B.weight": up}
        self.save(path / "adapter_model.safetensors", tensors, report)
        config = _config({name: factors[name].up.shape[1] for name in targets}, _saved_modules(model, whole))
        write_json(path / "adapter_config.json", config)


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


def _attention(model: nn.Module, path: str) -> nn.MultiheadAttention | None:
    """The attention that has this output projection; PEFT can only adapt the projection through the attention."""
    parent, _, last = path.rpartition(".")
    module = model.get_submodule(parent)
    return module if last == "out_proj" and isinstance(module, nn.MultiheadAttention) else None


def _complete_attentions(model: nn.Module, factors: dict[str, Factors]) -> list[str]:
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
        rank = max(len(factor.down) for factor in given)
        like = given[0].up
        for key, rows in zip(both, (3 * width, width), strict=True):
            own = factors.get(key) or Factors(like.new_zeros(rows, 0), like.new_zeros(0, width))
            factors[key] = own.padded(rank)
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


def _saved_modules(model: nn.Module, whole: Whole) -> list[str]:
    """The modules that consist of the tensors trained in full; PEFT can only save whole modules."""
    paths = [path for _, path in whole]
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
