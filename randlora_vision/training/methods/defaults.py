"""The defaults of a method: they depend on the data, on a budget of parameters, and so on the model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from randlora_vision.training.harness.options import AdapterOptions, Method
from randlora_vision.training.methods.lora import rank_for_budget

ALPHA_PER_RANK: Mapping[Method, float] = {"randlora": 20.0, "lora": 2.0}


@dataclass(frozen=True)
class Defaults:
    """What a method uses where the options do not say."""

    lr: float
    rank: int = 0
    """0 for a method without a rank."""


Table = Mapping[Method, Defaults]


def rank_of(adapter: AdapterOptions, default: int, model: nn.Module, targets: Callable[[], Iterable[str]]) -> int:
    """Return the rank: that of LoRA on `targets` if there is a budget, else that of the options, else the default."""
    if adapter.budget is not None:
        return rank_for_budget(model, targets(), adapter.budget)
    return adapter.rank or default
