"""Confidence intervals of proportions."""

import math
from collections.abc import Mapping

_Z = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson(proportion: float, samples: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion measured on `samples` independent samples."""
    centre = proportion + _Z**2 / (2 * samples)
    spread = _Z * math.sqrt(proportion * (1 - proportion) / samples + (_Z / (2 * samples)) ** 2)
    scale = 1 + _Z**2 / samples
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return min(max(0.0, low), proportion), max(min(1.0, high), proportion)  # despite rounding


_SAMPLES = {"top1": "samples", "top5": "samples", "image_to_text": "images", "text_to_image": "captions"}
"""For the beginnings of the metrics that are proportions: the metric with the number of samples behind them."""


def samples_of(name: str, values: Mapping[str, float]) -> int | None:
    """Return how many samples a metric is a proportion of, or None if it is not a proportion."""
    counted = next((count for start, count in _SAMPLES.items() if name.startswith(start)), "")
    return int(values[counted]) if counted in values else None


def intervals(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Return the 95% interval of every metric of a test that is a proportion."""
    return {
        name: list(wilson(value, samples)) for name, value in values.items() if (samples := samples_of(name, values))
    }
