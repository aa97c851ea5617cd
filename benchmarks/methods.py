"""The five fine-tuning methods that are compared, on the same layers and with equally many trained numbers."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter

Apply = Callable[[nn.Module, Sequence[str], int], nn.Module]
"""Adapts the layers of a model at these paths, with a rank of RandLoRA, and returns the model."""
_SCALING = 20  # alpha / rank, the same for PEFT's RandLora and ours


@dataclass(frozen=True)
class Method:
    """How a model is adapted, saved and loaded."""

    title: str  # name in the tables
    apply: Apply
    save: Callable[[nn.Module, Path], None]  # writes the files that a user would keep
    load: Callable[[nn.Module, Path], nn.Module]  # into a fresh base model


def trained_numbers(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def weight_shape(model: nn.Module, target: str) -> torch.Size:
    """Return the shape of a layer's weight, (outputs, inputs)."""
    return model.get_parameter(f"{target}.weight").shape


def randlora_numbers(model: nn.Module, targets: Sequence[str], rank: int) -> int:
    """Return how many numbers RandLoRA trains: R N + N m per layer, with N = ceil(m / R)."""
    narrow = [min(weight_shape(model, target)) for target in targets]
    return sum(math.ceil(m / rank) * (rank + m) for m in narrow)


def lora_rank(model: nn.Module, targets: Sequence[str], budget: int) -> int:
    """Return the LoRA rank whose number of trained numbers, r (O + I) per layer, is closest to `budget`."""
    per_rank = sum(sum(weight_shape(model, target)) for target in targets)
    return max(1, round(budget / per_rank))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings; also a decorator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def peft_model(model: nn.Module, config: object, adapter_name: str = "default") -> nn.Module:
    """Add adapters of PEFT to a model, without its warnings."""
    from peft import get_peft_model

    return get_peft_model(model, config, adapter_name)


@quiet()
def _peft_load(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)


@quiet()
def _peft_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _peft_lora(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    from peft import LoraConfig

    r = lora_rank(model, targets, randlora_numbers(model, targets, rank))
    return peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets)))


def _peft_randlora(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    from peft import RandLoraConfig

    alpha = _SCALING * rank
    return peft_model(model, RandLoraConfig(r=rank, randlora_alpha=alpha, target_modules=list(targets)))


def _peft_vera(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    from peft import VeraConfig

    return peft_model(model, VeraConfig(target_modules=list(targets)))


def ours(bases: str, compute: str = "auto") -> Apply:
    """Return RandLoRA with a kind of bases and an order of products."""

    def apply(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
        alpha, layers = _SCALING * rank, list(targets)
        inject(model, RandLoRAConfig(rank=rank, alpha=alpha, target_modules=layers, bases=bases, compute=compute))
        return model

    return apply


def _our_save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder / "adapter.safetensors")


def _our_load(model: nn.Module, folder: Path) -> nn.Module:
    load_adapter(model, folder / "adapter.safetensors", trainable=True)
    return model


def _full(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    return model.requires_grad_(True)


def _frozen(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    next(model.requires_grad_(False).parameters()).requires_grad_(True)  # gradients pass through the whole model
    return model


def _full_save(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")


def _full_load(model: nn.Module, folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", _full, _full_save, _full_load),
    "peft_lora": Method("PEFT LoRA", _peft_lora, _peft_save, _peft_load),
    "peft_randlora": Method("PEFT RandLora", _peft_randlora, _peft_save, _peft_load),
    "ours": Method("ours, dense bases", ours("uniform"), _our_save, _our_load),
    "ours_structured": Method("ours, structured bases", ours("structured"), _our_save, _our_load),
}
EVERY: dict[str, Method] = {
    **METHODS,
    "frozen": Method("no adapter", _frozen, _full_save, _full_load),
    "peft_vera": Method("PEFT VeRA", _peft_vera, _peft_save, _peft_load),
    **{
        f"{name}_{compute}": Method(
            f"{METHODS[name].title}, compute={compute}", ours(bases, compute), _our_save, _our_load
        )
        for name, bases in (("ours", "uniform"), ("ours_structured", "structured"))
        for compute in ("memory", "factored", "dense")
    },
}
"""Those methods, the model without any, VeRA, which trains far fewer numbers at any rank in use, and other orders."""
