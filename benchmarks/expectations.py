"""Limits that the measured figures are expected to meet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.report import Result, ratios

Measure = Callable[[Result, Result], float | None]


def _flops(own: Result, other: Result) -> float:
    return own.flops / other.flops


def _time(own: Result, other: Result) -> float | None:
    values = ratios(own, other)
    return median(values) if values else None


def _peak(own: Result, other: Result) -> float | None:
    if own.peak_bytes is None or other.peak_bytes is None:
        return None
    return own.peak_bytes / other.peak_bytes


@dataclass(frozen=True)
class Target:
    """`what` of a method is at most `limit` times that of `reference`, on rows whose title has this start and end."""

    what: str
    measure: Measure
    method: str
    reference: str
    limit: float
    start: str = ""
    end: str = ""


TARGETS = (
    Target("FLOPs", _flops, "ours", "peft_randlora", 0.69, "ViT-S/16, 16 images", "attention+mlp"),
    Target("FLOPs", _flops, "ours", "peft_randlora", 0.66, "ViT-B/16, 64 images", "attention+mlp"),
    Target("FLOPs", _flops, "ours", "peft_randlora", 1.00),
    Target("FLOPs", _flops, "ours_structured", "peft_randlora", 0.52, "ViT-B/16", "attention+mlp"),
    Target("FLOPs", _flops, "ours_structured", "peft_lora", 1.20, "ViT-B/16", "attention+mlp"),
    Target("step time", _time, "ours", "peft_randlora", 0.75, "ViT-B/16, 16 images", "attention+mlp"),
    Target("step time", _time, "ours_structured", "peft_lora", 1.35, "ViT-B/16, 16 images", "attention+mlp"),
    Target("peak memory", _peak, "ours", "peft_randlora", 0.80, "ViT"),
    Target("peak memory", _peak, "ours", "peft_lora", 1.02, "ViT"),
)


def verdicts(results: Sequence[Result]) -> list[str]:
    """Return one line for every target with measurements: the worst row, and by how much it misses the limit."""
    by = {(result.row, result.method): result for result in results}
    rows = list(dict.fromkeys(result.row for result in results))
    lines = []
    for target in TARGETS:
        measured = []
        for row in rows:
            if row.startswith(target.start) and row.endswith(target.end):
                value = target.measure(by[row, target.method], by[row, target.reference])
                if value is not None:
                    measured.append((value, row))
        if measured:
            value, row = max(measured)
            verdict = "met" if value <= target.limit else f"MISSED by {value / target.limit - 1:.0%}"
            lines.append(
                f"- {target.what} of {target.method} to {target.reference}: at most {target.limit:.2f} wanted, "
                f"{value:.3f} on {row}: {verdict}"
            )
    return lines
