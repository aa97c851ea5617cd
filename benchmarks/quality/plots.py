"""Plots of the runs: the score against the trained numbers, and against the learning rate."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from benchmarks.quality.methods import METHODS
from benchmarks.quality.report import BASES, Row, rows, tasks_of
from benchmarks.quality.search import Results, exponent_means
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import RATE_STEP
from randlora_vision.figures import figure_file

# One per method. RandLoRA's five kinds share a hue, from dark to light; every other method has a hue of its own.
_MARKERS = "os^vDP*X<>hdp"
_COLOURS = (
    "#08306b",
    "#2171b5",
    "#4292c6",
    "#6baed6",
    "#9ecae1",
    "#d62728",
    "#ff7f0e",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#444444",
    "#999999",
)
_WIDTH, _HEIGHT = 4.4, 3.4


def plot_budgets(results: Results, path: Path) -> None:
    """Plot the test score of every method at its best rate against its trained numbers, one panel per task."""
    tasks = tasks_of(results)
    with figure_file(path, _size(tasks), "Test score and trained numbers", layout="constrained") as figure:
        for axes, task in zip(_panels(figure, tasks), tasks, strict=False):
            found = rows(results, task)
            for row in found:
                if row.method == "probe" or row.method == "full":
                    axes.axhline(
                        row.mean,
                        color="#888888",
                        linestyle=":" if row.method == "probe" else "--",
                        label=METHODS[row.method].title,
                    )
            for number, method in enumerate(METHODS):
                own = [row for row in found if row.method == method]
                if own and method not in ("probe", "full"):
                    _points(axes, own, number)
            axes.set(title=TASKS[task].title, xlabel="trained numbers", ylabel=f"test {TASKS[task].score}")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure)


def _points(axes: Axes, own: Sequence[Row], number: int) -> None:
    axes.errorbar(
        [row.result["trained"] for row in own],
        [row.mean for row in own],
        [0 if math.isnan(row.half_width) else row.half_width for row in own],
        color=_COLOURS[number],
        marker=_MARKERS[number],
        capsize=2,
        linewidth=1,
        label=METHODS[own[0].method].title,
    )


def plot_rates(results: Results, path: Path) -> None:
    """Plot the validation score against the rate, relative to the centre of each method's grid, one panel per task."""
    tasks = tasks_of(results)
    with figure_file(path, _size(tasks), "Validation score and learning rate", layout="constrained") as figure:
        for axes, task in zip(_panels(figure, tasks), tasks, strict=False):
            for number, method in enumerate(METHODS):
                budget = 1 if METHODS[method].sized else -1
                means = dict(sorted(exponent_means(results, task, method, budget, "val").items()))
                axes.plot(
                    [RATE_STEP**exponent for exponent in means],
                    list(means.values()),
                    color=_COLOURS[number],
                    linestyle="-" if method in BASES else "--",
                    marker=_MARKERS[number],
                    linewidth=1,
                    label=METHODS[method].title,
                )
            label = "rate / centre of the grid (RandLoRA: a first step of 1%)"
            axes.set(title=TASKS[task].title, xlabel=label, ylabel=f"validation {TASKS[task].score}", xscale="log")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure)


def _size(tasks: Sequence[str]) -> tuple[float, float]:
    columns = min(3, len(tasks))
    return _WIDTH * columns, _HEIGHT * math.ceil(len(tasks) / columns) + 0.9


def _panels(figure: Figure, tasks: Sequence[str]) -> list[Axes]:
    columns = min(3, len(tasks))
    panels = figure.subplots(math.ceil(len(tasks) / columns), columns, squeeze=False).ravel()
    for spare in panels[len(tasks) :]:
        spare.axis("off")
    return list(panels)


def _legend(figure: Figure) -> None:
    """One legend for all panels, with every label once."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=7)
