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


def in_words(value: Callable[[Defaults], float], usual: Table, digits: Table) -> str:
    """Return the defaults of every method, as the help shows them."""
    tables = [
        ", ".join(f"{method} {value(defaults):g}" for method, defaults in table.items() if value(defaults))
        for table in (usual, digits)
    ]
    return f"{tables[0]}; digits: {tables[1]}"


def help_defaults(usual: Table, digits: Table, steps: tuple[int, int]) -> dict[str, str]:
    """Return the defaults that depend on the method and the data, by flag."""
    scales = {method: factor for method, factor in ALPHA_PER_RANK.items() if method in usual}
    return {
        "--steps": "{}; digits: {}".format(*steps),
        "--lr": in_words(lambda defaults: defaults.lr, usual, digits),
        "--rank": in_words(lambda defaults: defaults.rank, usual, digits),
        "--alpha": ", ".join(f"{method} {factor:g} x rank" for method, factor in scales.items()),
    }


def rank_note(given: AdapterOptions, usual: int) -> str:
    """Return a note for a RandLoRA rank below the usual one, which LoRA's users may mean the other way round."""
    if given.method != "randlora" or given.rank is None or given.rank >= usual:
        return ""
    return (
        f"note: --rank {given.rank} trains MORE numbers than the usual {usual}: "
        "unlike LoRA's, a larger rank of RandLoRA trains fewer"
    )
