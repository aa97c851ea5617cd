"""The defaults of a method: they depend on the data, on a budget of parameters, and so on the model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import nn

from randlora_vision.training.harness.options import AdapterOptions, Method
from randlora_vision.training.methods.rivals import rank_for_budget

_Adapter = TypeVar("_Adapter", bound=AdapterOptions)
ALPHA_PER_RANK: Mapping[Method, float] = {"randlora": 20.0, "lora": 2.0, "dora": 2.0}


@dataclass(frozen=True)
class Defaults:
    """What a method uses where the options do not say."""

    lr: float
    rank: int = 0
    """0 for a method without a rank."""
    suggested: bool = False
    """Whether the rate of the adapters is that of `suggest_lr`; `lr` is then for what else is trained."""

    def rate(self, given: float | Literal["auto"] | None, method: Method) -> tuple[float, bool]:
        """Return the rate for that of the options, and whether `suggest_lr` replaces it for the adapters.

        Raises ValueError for "auto" with a method that the rule is not for.
        """
        if given == "auto" and method != "randlora":
            raise ValueError(
                f"--lr auto is a rule for --method randlora: leave --lr out, --method {method} then takes {self.lr:g}"
            )
        if given is None or given == "auto":
            return self.lr, given == "auto" or self.suggested
        return given, False


Table = Mapping[Method, Defaults]


@dataclass(frozen=True)
class ScriptDefaults:
    """The defaults of a script, for your own data and for its demo."""

    own: Table
    demo: Table
    own_steps: int
    demo_steps: int

    def of(self, method: Method, embedded: bool) -> Defaults:
        """Return the defaults of a method."""
        return (self.demo if embedded else self.own)[method]

    def steps(self, embedded: bool) -> int:
        """Return the number of optimiser steps."""
        return self.demo_steps if embedded else self.own_steps

    def rank_note(self, given: AdapterOptions, embedded: bool) -> str:
        """Return a note for a RandLoRA rank below the usual one, which LoRA's users may mean the other way round."""
        usual = self.of("randlora", embedded).rank
        if given.method != "randlora" or given.rank is None or given.rank >= usual:
            return ""
        return (
            f"note: --rank {given.rank} trains MORE numbers than the usual {usual}: "
            "unlike LoRA's, a larger rank of RandLoRA trains fewer"
        )

    def help(self) -> dict[str, str]:
        """Return the defaults that depend on the method and the data, by flag, as the help shows them."""
        scales = {method: factor for method, factor in ALPHA_PER_RANK.items() if method in self.own}
        return {
            "--steps": f"{self.own_steps}; demo: {self.demo_steps}",
            "--lr": self._in_words(lambda row: "auto" if row.suggested else f"{row.lr:g}"),
            "--rank": self._in_words(lambda row: str(row.rank) if row.rank else ""),
            "--alpha": ", ".join(f"{method} {factor:g} x rank" for method, factor in scales.items()),
        }

    def _in_words(self, value: Callable[[Defaults], str]) -> str:
        own, demo = (
            ", ".join(f"{method} {word}" for method, row in table.items() if (word := value(row)))
            for table in (self.own, self.demo)
        )
        return f"{own}; demo: {demo}"


def with_rank(
    adapter: _Adapter, default: int, model: nn.Module | None = None, targets: Callable[[], Iterable[str]] = tuple
) -> _Adapter:
    """Return the options with rank and alpha filled in; unchanged for a method without a rank, whose default is 0.

    A budget chooses the rank for the `targets` in the model.
    """
    if not default:
        return adapter
    rank = adapter.rank or default
    if model is not None and adapter.budget is not None:
        rank = rank_for_budget(adapter.method, model, targets(), adapter.budget)
    scale = ALPHA_PER_RANK.get(adapter.method)
    return replace(adapter, rank=rank, alpha=adapter.alpha or (scale * rank if scale else None), budget=None)
