"""What the loop keeps from step to step besides the parameters: running means for the log, and the best result.

By hand, because every checkpoint holds them as JSON.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


class Mean:
    """Means of the values added since the last call of `take`."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self._sums = dict(sums or {})
        self._count = count

    def state(self) -> tuple[dict[str, float], int]:
        """Return the arguments that recreate this object."""
        return self._sums, self._count

    def add(self, values: Mapping[str, float]) -> None:
        """Add one value for each name."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        """Return the means by name, and reset them."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def peak_memory() -> float:
    """Return the peak memory use so far in GB (10^9 bytes): of the GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its step, its value, and the number of evaluations since."""

    step: int
    value: float
    evaluations_since: int = 0


def best_of(best: Best | None, step: int, values: Mapping[str, float], metric: str) -> Best:
    """Return the better of `best` and the values of `step`; ties do not count as an improvement.

    For a loss and a drift, smaller is better; for every other metric, larger is better. Raises ValueError when
    the metric was not measured.
    """
    if metric not in values:
        raise ValueError(f"--best-metric {metric} is not measured; choose one of {', '.join(values)}")
    value = values[metric]
    smaller = "loss" in metric or "drift" in metric
    if best is None or (value < best.value if smaller else value > best.value):
        return Best(step, value)
    return replace(best, evaluations_since=best.evaluations_since + 1)


Log = Callable[[int, str, Mapping[str, float]], None]  # step, split, values
