"""Tiny pipelines with adapters that act, and the plain pipelines that they must equal."""

from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision import InjectionReport, RandLoRAConfig, inject
from tests.helpers import dense_delta, parameter_path, randomize
from tests.tiny_pipelines import PIPELINES

RANK = 4


def denoiser(pipe: Any) -> nn.Module:
    return pipe.components.get("unet") or pipe.transformer


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part}


def adapt(pipe: Any, text: bool = True, name: str = "default", seed: int = 0) -> dict[str, InjectionReport]:
    """Give a pipeline an adapter that acts on every part, drawn from `seed`."""
    parts = {"unet" if "unet" in pipe.components else "transformer": denoiser(pipe)}
    parts |= text_encoders(pipe) if text else {}
    reports = {}
    for number, (part, model) in enumerate(parts.items()):
        preset = "diffusers:text" if number else "diffusers:backbone"
        config = RandLoRAConfig(rank=RANK + number, target_modules=preset, seed=seed + number)
        reports[part] = inject(model, config, name)
        randomize(model, name, seed=seed + number)
    return reports


def few_targets(model: nn.Module, *names: str) -> None:
    """Give a denoiser an adapter on a few layers of each block: compiling takes its time by the adapted layer."""
    inject(model, RandLoRAConfig(rank=RANK, target_modules=names))
    randomize(model)


def deltas(pipe: Any, reports: dict[str, InjectionReport]) -> dict[str, Tensor]:
    """Component and parameter path -> update in float64, by the formula written out."""
    found = {}
    for part, report in reports.items():
        model = getattr(pipe, part)
        state = model.state_dict()
        side = max(target.narrow for target in report.targets)
        for target in report.targets:
            path = parameter_path(model, target.name)
            lam, gamma = (state[f"{path}_randlora_{p}_{report.adapter_name}"] for p in ("lambda", "gamma"))
            config = report.config
            scale = target.alpha / target.rank
            found[f"{part}.{path}"] = dense_delta(lam, gamma, target.shape, scale, config.bases, config.seed, side)
    return found


@torch.no_grad()
def plain(family: str, *updates: dict[str, Tensor]) -> Any:
    """A pipeline without adapters whose weights are the base's plus the updates."""
    pipe = PIPELINES[family]()
    for update in updates:
        for name, delta in update.items():
            part, _, path = name.partition(".")
            weight = getattr(pipe, part).get_parameter(path)
            weight.copy_(weight.double() + delta.reshape(weight.shape))
    return pipe


def scaled(update: dict[str, Tensor], factor: float, prefix: str = "") -> dict[str, Tensor]:
    """The update with the weights whose name starts so multiplied."""
    return {name: factor * delta if name.startswith(prefix) else delta for name, delta in update.items()}


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def lora(pipe: Any, rank: int = 2, seed: int = 5) -> dict[str, Tensor]:
    """A LoRA file's content as diffusers loads it: query and value of the denoiser, query of one text encoder."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    part = "unet" if "unet" in pipe.components else "transformer"
    for name, model in ((part, getattr(pipe, part)), ("text_encoder", pipe.text_encoder)):
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in ("to_q", "to_v", "q_proj"):
                sizes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
                for letter, size in sizes.items():
                    numbers = torch.randn(size, generator=generator) * 0.2
                    found[f"{name}.{path}.lora_{letter}.weight"] = numbers
    return found


def lora_deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Component and parameter path -> B A."""
    return {
        name.replace("lora_A.", ""): state[name.replace("lora_A", "lora_B")].double() @ low.double()
        for name, low in state.items()
        if "lora_A" in name
    }
