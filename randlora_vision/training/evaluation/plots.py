"""Figures of a run: curves, predictions before and after training, and comparisons of methods."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from randlora_vision.files.atomic import replacing

Metrics = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
HEADLINES = {"top1": "top-1", "mean_recall": "mean recall"}  # of a test, the first of these that it has
_RIGHT, _WRONG = "#1a7f37", "#c62828"
_COLOURS = ("#1f5fbf", "#d9822b", "#4c9f50", "#8e4fa8", "#7f7f7f")
_MEASURED = {  # the validation metrics that are drawn
    "top1": ("top-1", _COLOURS[0]),
    "top5": ("top-5", _COLOURS[2]),
    "mean_recall": ("mean recall", _COLOURS[0]),
    "image_to_text_r1": ("image to text, recall@1", _COLOURS[2]),
    "text_to_image_r1": ("text to image, recall@1", _COLOURS[3]),
}
_DPI = 150
_NAMED, _NUMBERED = 30, 15  # most classes of a confusion matrix drawn with names, and with numbers


def series(metrics: Metrics, split: str, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric."""
    lines = [line for line in metrics if line["split"] == split and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def plot_curves(metrics: Metrics, title: str, path: Path) -> None:
    """Plot loss, validation accuracy and learning rate against the steps."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    loss.plot(*series(metrics, "train", "loss"), color=_COLOURS[0], alpha=0.6, label="training batches")
    steps, values = series(metrics, "val", "loss")
    if values:
        loss.plot(steps, values, color=_COLOURS[1], marker="o", markersize=4, label="validation")
    loss.set(title="Loss", ylabel="loss")
    loss.set_ylim(bottom=0)
    for name, (label, colour) in _MEASURED.items():
        steps, values = series(metrics, "val", name)
        if not values:
            continue
        accuracy.plot(steps, values, color=colour, marker="o", markersize=4, label=label)
        if name in HEADLINES:
            accuracy.axhline(values[0], color=colour, linestyle=":", label=f"before training, {label} {values[0]:.1%}")
    _percent(accuracy, "Validation images")
    steps, values = series(metrics, "train", "lr")
    rate.plot(steps, values, color=_COLOURS[4])
    rate.set(title="Learning rate", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, accuracy, rate):
        over_steps(axes)
    for axes in (loss, accuracy):
        axes.legend(fontsize=8)
    save_figure(figure, title, path)


@dataclass(frozen=True)
class Prediction:
    """One image with its class and the model's answers before and after training."""

    picture: Image.Image
    truth: str
    before: str | None  # None where there was no classifier yet
    after: str


def plot_predictions(predictions: Sequence[Prediction], title: str, path: Path, columns: int = 8) -> None:
    """Draw a grid of images, each with its class and the two answers, green where right and red where wrong."""
    rows = -(-len(predictions) // columns)
    height = 2.15 * rows + 0.7
    # A manual layout, since laying out this many labels automatically takes seconds.
    figure = Figure(figsize=(1.6 * columns, height))
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.75 / height, bottom=0.5 / height, hspace=0.55, wspace=0.1)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, item in zip(grid.flat, predictions, strict=False):
        axes.imshow(item.picture)
        axes.set_title(_shortened(item.truth), fontsize=10, fontweight="bold")
        answers = [("before", item.before), ("answer" if item.before is None else "after", item.after)]
        for line, (when, answer) in enumerate((when, answer) for when, answer in answers if answer is not None):
            right = answer == item.truth
            axes.text(
                0.5,
                -0.10 - 0.15 * line,
                f"{when}: {_shortened(answer)} {'✓' if right else '✗'}",
                transform=axes.transAxes,
                ha="center",
                va="center",
                fontsize=9,
                color=_RIGHT if right else _WRONG,
            )
    save_figure(figure, title, path)


@dataclass(frozen=True)
class Found:
    """One image with its caption and the nearest caption by the model, before and after training."""

    picture: Image.Image
    caption: str
    before: tuple[str, bool] | None  # the caption, and whether it is correct; None if not measured
    after: tuple[str, bool]


def plot_found(items: Sequence[Found], title: str, path: Path, columns: int = 2) -> None:
    """Draw images next to their captions and the retrieved ones, green where right and red where wrong."""
    rows = -(-len(items) // columns)
    height = 1.7 * rows + 0.7
    figure = Figure(figsize=(6.4 * columns, height))
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(1, 2.6) * columns)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / height, bottom=0.02, hspace=0.12, wspace=0.04)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, item in enumerate(items):
        row, column = divmod(number, columns)
        grid[row, 2 * column].imshow(item.picture)
        words = grid[row, 2 * column + 1]
        lines = [("caption", item.caption, "black")]
        for when, answer in (("before", item.before), ("found" if item.before is None else "after", item.after)):
            if answer is not None:
                text, right = answer
                lines.append((f"{when} {'✓' if right else '✗'}", text, _RIGHT if right else _WRONG))
        for line, (label, text, colour) in enumerate(lines):
            place = 0.95 - 0.33 * line
            words.text(0.0, place, label, transform=words.transAxes, fontsize=8, va="top", color="#666666")
            wrapped = "\n".join(wrap(_shortened(text, 96), 48))
            words.text(0.17, place, wrapped, transform=words.transAxes, fontsize=9, va="top", color=colour)
    save_figure(figure, title, path)


def plot_scales(scales: Sequence[float], values: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Plot the results of each test (`values`, by name) from scale 0, the base model, to 1, the adapted model."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, line), colour in zip(values.items(), itertools.cycle(_COLOURS)):
        axes.plot(scales, line, color=colour, marker="o", markersize=5, label=name)
    axes.set(xlabel="scale of the adapter (0: the base model, 1: as trained)", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, title, path)


def plot_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str, path: Path) -> None:
    """Draw the confusion matrix: the fraction of each true class (row) that got each answer (column).

    Up to 30 classes are named, and for up to 15 the numbers of images are written in the cells.
    """
    classes = len(names)
    side = min(10.0, max(5.0, 2.5 + 0.45 * classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    parts = [[count / max(1, sum(row)) for count in row] for row in counts]
    shown = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="answer", ylabel="true class")
    if classes <= _NAMED:
        short = [_shortened(name) for name in names]
        axes.set_xticks(range(classes), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), short)
    else:
        axes.set(xlabel=f"answer (classes 0 to {classes - 1})", ylabel=f"true class (0 to {classes - 1})")
    for row, line in enumerate(counts if classes <= _NUMBERED else ()):
        for column, count in enumerate(line):
            if count:
                colour = "white" if parts[row][column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(shown, ax=axes, label="part of the true class", format=PercentFormatter(1.0), shrink=0.8)
    save_figure(figure, title, path)


@dataclass(frozen=True)
class Compared:
    """The run of one method, for `plot_comparison`."""

    label: str
    metrics: Metrics
    accuracies: Mapping[str, tuple[float, float]]  # per task: before, after


def plot_comparison(runs: Sequence[Compared], title: str, task: str, path: Path) -> None:
    """Plot validation accuracy against the steps, one line per method, and accuracies on `task` before and after.

    `task` is "test" or "validation".
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for run, colour in zip(runs, _COLOURS, strict=False):
        steps, values = next(found for name in HEADLINES if (found := series(run.metrics, "val", name))[0])
        curves.plot(steps, values, color=colour, marker="o", markersize=4, label=run.label)
    _percent(curves, "While training (validation images)")
    over_steps(curves)
    curves.legend(loc="lower right", fontsize=9)
    _before_and_after(bars, runs, task)
    save_figure(figure, title, path)


def _before_and_after(axes: Axes, runs: Sequence[Compared], task: str) -> None:
    """Draw one grey bar for the base model and one bar per method for every task."""
    tasks = list(runs[0].accuracies)
    width = 0.8 / (len(runs) + 1)
    bars = [("before", [runs[0].accuracies[task][0] for task in tasks], "#bbbbbb")]
    for run, colour in zip(runs, _COLOURS, strict=False):
        bars.append((run.label, [run.accuracies[task][1] for task in tasks], colour))
    for position, (_, heights, colour) in enumerate(bars):
        places = [number + position * width for number in range(len(tasks))]
        drawn = axes.bar(places, heights, width * 0.92, color=colour)
        axes.bar_label(drawn, [f"{height:.1%}" for height in heights], fontsize=8)
    axes.set_xticks([number + width * len(runs) / 2 for number in range(len(tasks))], tasks)
    _percent(axes, f"{task.capitalize()} accuracy (grey: before training)")


def over_steps(axes: Axes) -> None:
    """Label the horizontal axis with optimiser steps."""
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(alpha=0.3)


def _percent(axes: Axes, title: str) -> None:
    axes.set(title=title, ylabel="right answers", ylim=(0, 1.06))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _shortened(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def save_figure(figure: Figure, title: str, path: Path) -> None:
    """Set the title of a figure and write it atomically."""
    figure.suptitle(title, fontweight="bold")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
