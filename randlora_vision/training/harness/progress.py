"""What the loop remembers from step to step, beside the numbers it trains: means to be logged, and the best result."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


class Mean:
    """Means of values added since they were last taken."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self._sums = dict(sums or {})
        self._count = count

    def state(self) -> tuple[dict[str, float], int]:
        """Return the arguments that make this object again."""
        return self._sums, self._count

    def add(self, values: Mapping[str, float]) -> None:
        """Count in one value of each name."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        """Return the means by name, and start again."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def peak_memory() -> float:
    """Return the most memory that was in use so far, in GB (10^9 bytes): the GPU's, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # no Windows has it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: after which step, of which value, and how many came after it."""

    step: int
    value: float
    evaluations_since: int = 0


def best_of(best: Best | None, step: int, values: Mapping[str, float], metric: str) -> Best:
    """Return the best of what was known and the values of `step`; an equal value is no better one.

    Of a loss the smaller is the better, of everything else the larger. Raises ValueError when no
    such metric was measured.
    """
    if metric not in values:
        raise ValueError(f"--best-metric {metric}: nothing of that name is measured, only {', '.join(values)}")
    value = values[metric]
    if best is None or (value < best.value if "loss" in metric else value > best.value):
        return Best(step, value)
    return replace(best, evaluations_since=best.evaluations_since + 1)


Log = Callable[[int, str, Mapping[str, float]], None]  # step, split, values
