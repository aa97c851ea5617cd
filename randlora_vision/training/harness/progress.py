"""What the loop keeps from step to step besides the parameters: running means for the log, and the best result.

By hand, because every checkpoint holds them as JSON.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""The progress bar of tqdm without its own rate, so that the losses fit beside it on 80 columns."""


def wrapped(text: str, width: int) -> str:
    """Return a text for a terminal: prose broken at spaces, tables of targets with shorter names, the rest as it is."""
    parts = re.split(r"(^target  .*?(?=\n\n|\Z))", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(_narrowed(part, width) if part.startswith("target  ") else _broken(part, width) for part in parts)


def _broken(text: str, width: int) -> str:
    return "\n".join(
        line
        if len(line) <= width or line.startswith("    ") or "  " in line.strip()
        else textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def _narrowed(table: str, width: int) -> str:
    """Shorten the names in the first column, from the left, so that the table fits."""
    rows = table.split("\n")
    wide = rows[0].index("kind") - 2
    narrow = max(12, wide - max(0, len(rows[0]) - width))
    names = (row[:wide].rstrip() for row in rows)
    short = (name if len(name) <= narrow or "---" in name else f"…{name[1 - narrow :]}" for name in names)
    return "\n".join(name[:narrow].ljust(narrow) + row[wide:] for name, row in zip(short, rows, strict=True))


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


def smaller_is_better(metric: str) -> bool:
    """Return whether a metric is a loss or a drift."""
    return "loss" in metric or "drift" in metric


def best_of(best: Best | None, step: int, values: Mapping[str, float], metric: str) -> Best:
    """Return the better of `best` and the values of `step`; ties do not count as an improvement.

    For a loss and a drift, smaller is better; for every other metric, larger is better. Raises ValueError when
    the metric was not measured.
    """
    if metric not in values:
        raise ValueError(f"--best-metric {metric} is not measured; choose one of {', '.join(values)}")
    value = values[metric]
    if best is None or (value < best.value if smaller_is_better(metric) else value > best.value):
        return Best(step, value)
    return replace(best, evaluations_since=best.evaluations_since + 1)


Log = Callable[[int, str, Mapping[str, float]], None]  # step, split, values
