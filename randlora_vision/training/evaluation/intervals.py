"""Confidence intervals of proportions, and of means over seeds.

Wilson's is by hand, because SciPy's is of a whole number of successes, and the proportions here are rounded means.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

RECALL_AT = (1, 5, 10)
_Z = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson(proportion: float, samples: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion measured on `samples` independent samples."""
    centre = proportion + _Z**2 / (2 * samples)
    spread = _Z * math.sqrt(proportion * (1 - proportion) / samples + (_Z / (2 * samples)) ** 2)
    scale = 1 + _Z**2 / samples
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return min(max(0.0, low), proportion), max(min(1.0, high), proportion)  # despite rounding


_SAMPLES = {
    "top1": "samples",
    "top5": "samples",
    **{f"image_to_text_r{most}": "images" for most in RECALL_AT},
    **{f"text_to_image_r{most}": "captions" for most in RECALL_AT},
    "subject": "subject_pictures",
    "emoji_kept": "emoji_pictures",
}
"""For the metrics that are proportions: the metric with the number of samples behind them."""


def samples_of(name: str, values: Mapping[str, float]) -> int | None:
    """Return how many samples a metric is a proportion of, or None if it is not a proportion."""
    counted = _SAMPLES.get(name, "")
    return int(values[counted]) if counted in values else None


def intervals(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Return the 95% interval of every metric of a test that is a proportion."""
    return {
        name: list(wilson(value, samples)) for name, value in values.items() if (samples := samples_of(name, values))
    }


def seeds_half_width(values: Sequence[float]) -> float:
    """Return half the 95% interval of the mean over two or more seeds, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
