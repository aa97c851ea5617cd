"""Pictures of what fine-tuning changed: spectra, ranks, similarity of features, and the loss on a plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from randlora_vision.figures import figure_file
from randlora_vision.training.evaluation.comparison import LABELS

TITLES = {
    "spectra.png": "Singular values of the updates",
    "ranks.png": "Effective rank of the updates",
    "features.png": "Likeness of features",
    "landscape.png": "Training loss on the plane through three models",
}
_COLOURS = {method: f"C{number}" for number, method in enumerate(LABELS)}
_FLOOR = 1e-8  # smaller singular values, relative to the largest, are rounding errors
_POINTS = 200


def plot_spectra(values: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Plot the singular values of each method's updates: the median over the weights, and the middle 80% of them.

    Args:
        values: Singular values (m,), largest first, by method and weight.
        path: The file.
    """
    with figure_file(path, (8, 5), TITLES[path.name], layout="constrained") as figure:
        axes = figure.subplots()
        share = np.linspace(0, 1, _POINTS)
        for method, held in values.items():
            lines = [np.clip((own / own[0].clamp(min=1e-300)).numpy(), _FLOOR, None) for own in held.values()]
            stacked = np.stack([np.interp(share, np.linspace(0, 1, len(line)), line) for line in lines])
            low, middle, high = np.quantile(stacked, (0.1, 0.5, 0.9), axis=0)
            axes.plot(share, middle, color=_COLOURS[method], label=LABELS[method])
            axes.fill_between(share, low, high, color=_COLOURS[method], alpha=0.15, linewidth=0)
        axes.set(
            xlabel="index of the singular value / narrow side of the weight",
            ylabel="singular value / largest one",
            yscale="log",
        )
        axes.legend()


def plot_ranks(ranks: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot the effective rank over the narrow side of each update, by method and weight, in the model's order."""
    with figure_file(path, (9, 4.5), TITLES[path.name], layout="constrained") as figure:
        axes = figure.subplots()
        for method, held in ranks.items():
            axes.plot(range(len(held)), list(held.values()), color=_COLOURS[method], marker=".", label=LABELS[method])
        axes.set(
            xlabel="adapted weight, in the order of the model", ylabel="effective rank / narrow side", ylim=(0, 1.02)
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()


def plot_similarity(similarity: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Plot the CKA of each block's features, by the model compared with, method and block."""
    with figure_file(path, (6 * len(similarity), 4.5), TITLES[path.name], layout="constrained") as figure:
        panels = figure.subplots(1, len(similarity), squeeze=False)[0]
        for axes, (other, methods) in zip(panels, similarity.items(), strict=True):
            for method, held in methods.items():
                axes.plot(
                    range(len(held)), list(held.values()), color=_COLOURS[method], marker="o", label=LABELS[method]
                )
            title = "to the base model" if other == "base" else f"to {LABELS[other]}"
            axes.set(title=title, xlabel="block, in the order of the model", ylabel="CKA")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if methods:
                axes.legend()


def plot_landscape(
    u: Sequence[float],
    v: Sequence[float],
    loss: Sequence[Sequence[float]],
    points: Mapping[str, tuple[float, float]],
    path: Path,
) -> None:
    """Draw the loss (rows: v, columns: u) as contours of its logarithm, with the models."""
    with figure_file(path, (7.5, 6), TITLES[path.name], layout="constrained") as figure:
        axes: Axes = figure.subplots()
        values = np.log10(np.clip(np.asarray(loss), 1e-6, None))
        drawn = axes.contourf(u, v, values, levels=20, cmap="viridis")
        figure.colorbar(drawn, ax=axes, label="log10 of the training loss")
        for method, (x, y) in points.items():
            axes.plot(x, y, marker="o", markersize=9, color=_COLOURS[method], markeredgecolor="white")
            axes.annotate(LABELS[method], (x, y), xytext=(6, 6), textcoords="offset points", color="white")
        axes.set(xlabel="distance in weights", ylabel="distance in weights", aspect="equal")
        axes.grid(False)
