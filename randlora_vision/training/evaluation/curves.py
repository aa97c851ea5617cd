"""Curves over a run, and comparisons: losses, accuracies, learning rates, scales, confusion, methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from randlora_vision.figures import figure_file, plain
from randlora_vision.names import printable
from randlora_vision.training.evaluation.grids import shortened
from randlora_vision.training.harness.progress import smaller_is_better

Metrics = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
HEADLINES = {"top1": "top-1 accuracy", "mean_recall": "mean recall"}  # of a test, the first of these that it has
_DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
_RECALL_LINES = {1: "-", 5: "--", 10: ":"}
_NAMED, _NUMBERED = 30, 15  # most classes of a confusion matrix drawn with names, and with numbers
_INSIDE = 4  # most lines whose legend is drawn among them
_LABEL = 24  # characters in a line below a bar
_SMOOTHED = 20  # from so many points on, a smoothed line is drawn over a training loss


def series(metrics: Metrics, split: str, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric."""
    lines = [line for line in metrics if line["split"] == split and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def evaluations(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric that was measured during training, on held-out images or others."""
    held_out = series(metrics, "val", name)
    return held_out if held_out[0] else series(metrics, "eval", name)


def plot_curves(
    metrics: Metrics,
    title: str,
    path: Path,
    losses: Mapping[str, str] = {"loss": "validation images"},
    shares: Mapping[str, str] = {},
) -> None:
    """Plot the losses, the accuracies, recalls or `shares` if any were measured, and the learning rates over the steps.

    `losses` and `shares` map the names of validation losses, and of other metrics between 0 and 1, to their labels.
    """
    measured = any(evaluations(metrics, name)[0] for name in (*HEADLINES, *shares))
    size = (12, 4.2) if measured else (9.5, 3.9)
    with figure_file(path, size, title, layout="constrained") as figure:
        loss, *between, rate = figure.subplots(1, 3 if measured else 2, width_ratios=(3, 3, 2) if measured else (3, 2))
        _losses(loss, metrics, losses)
        for axes in between:
            _shares(axes, metrics, shares) if shares else _accuracies(axes, metrics)
        _rates(rate, metrics)


def _losses(axes: Axes, metrics: Metrics, validation: Mapping[str, str]) -> None:
    """Draw the training loss, smoothed where it has many points, and validation losses (metric -> label)."""
    steps, values = series(metrics, "train", "loss")
    if len(steps) >= _SMOOTHED:
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="training batches")
        axes.plot(steps, smoothed(values), color="C0", label="training batches, smoothed")
    elif steps:
        _line(axes, steps, values, "training batches", "C0")
    for (name, label), colour in zip(validation.items(), ("C1", "C2"), strict=False):
        steps, values = evaluations(metrics, name)
        if steps:
            axes.plot(steps, values, color=colour, marker="o", label=label)
    axes.set(title="Loss", ylabel="loss")
    _over_steps(axes)


def _rates(axes: Axes, metrics: Metrics) -> None:
    """Draw every learning rate of the run: those named "lr" and "lr_<which>"."""
    names = sorted({name for line in metrics for name in line if name == "lr" or name.startswith("lr_")})
    for number, name in enumerate(names):
        steps, values = series(metrics, "train", name)
        which = name.removeprefix("lr").removeprefix("_").replace("_", " ")
        _line(axes, steps, values, which or "adapters", f"C{number}")
    axes.set(title="Learning rate", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _over_steps(axes, legend=len(names) > 1)


def _accuracies(axes: Axes, metrics: Metrics) -> None:
    headline = "accuracy"
    for name, label in HEADLINES.items():
        steps, values = evaluations(metrics, name)
        if not steps:
            continue
        headline = "recall" if "recall" in label else "accuracy"
        axes.plot(steps, values, color="C0", marker="o", label=label)
        axes.axhline(values[0], color="C0", linestyle=":", label=f"before training, {values[0]:.1%}")
    steps, values = evaluations(metrics, "top5")
    if steps:
        axes.plot(steps, values, color="C1", marker="o", label="top-5 accuracy")
    for (way, label), colour in zip(_DIRECTIONS.items(), ("C1", "C2"), strict=True):
        for most, line in _RECALL_LINES.items():
            steps, values = evaluations(metrics, f"{way}_r{most}")
            if steps:
                text = f"{label}, recall@{most}"
                axes.plot(steps, values, color=colour, linestyle=line, linewidth=1, marker=".", label=text)
    _percent(axes, "Validation images", headline)
    _over_steps(axes)


def _shares(axes: Axes, metrics: Metrics, shares: Mapping[str, str]) -> None:
    for name, label in shares.items():
        steps, values = evaluations(metrics, name)
        if steps:
            axes.plot(steps, values, marker="o", label=label)
    _percent(axes, "Subject and prior", "share or likeness")
    _over_steps(axes)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average over a tenth of the points, without a bias towards zero at the start."""
    decay = 1 - 10 / max(len(values), 10)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, colour: str) -> None:
    axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < _SMOOTHED else "")


def plot_scales(
    scales: Sequence[float], values: Mapping[str, Sequence[float]], ylabel: str, title: str, path: Path
) -> None:
    """Plot the results of each test (`values`, by name) from scale 0, the base model, to 1, the adapted model."""
    with figure_file(path, (7, 4.4), title, layout="constrained") as figure:
        axes = figure.subplots()
        for name, line in values.items():
            axes.plot(scales, line, marker="o", label=plain(printable(name)))
        axes.set(xlabel="scale of the adapter (0: base model, 1: as trained)")
        _percent(axes, "", ylabel)
        axes.legend()


def plot_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str, path: Path) -> None:
    """Draw what fraction of each true class (row) got each answer; up to 30 classes are named, up to 15 numbered."""
    classes = len(names)
    side = min(10.0, max(5.0, 2.5 + 0.45 * classes))
    with figure_file(path, (side + 1, side), title, layout="constrained") as figure:
        axes = figure.subplots()
        axes.grid(False)
        parts = [[count / max(1, sum(row)) for count in row] for row in counts]
        shown = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="answer", ylabel="true class")
        if classes <= _NAMED:
            short = [plain(shortened(name)) for name in names]
            axes.set_xticks(range(classes), short, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(classes), short)
        else:
            axes.set(xlabel=f"answer (classes 0 to {classes - 1})", ylabel=f"true class (0 to {classes - 1})")
        for row, line in enumerate(counts if classes <= _NUMBERED else ()):
            for column, count in enumerate(line):
                if count:
                    colour = "white" if parts[row][column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
        percent = PercentFormatter(1.0)
        figure.colorbar(shown, ax=axes, label="fraction of the true class", format=percent, shrink=0.8)


@dataclass(frozen=True)
class Compared:
    """The run of one method, for `plot_comparison`."""

    label: str
    metrics: Metrics
    accuracies: Mapping[str, tuple[float | None, float]]  # per task: before (None: not measured), after


def plot_comparison(runs: Sequence[Compared], title: str, path: Path) -> None:
    """Plot validation accuracy over the steps, a line per method, and the accuracies before and after."""
    with figure_file(path, (12, 4.6), title, layout="constrained") as figure:
        curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        for run in runs:
            name, (steps, values) = next(
                (name, found) for name in HEADLINES if (found := evaluations(run.metrics, name))[0]
            )
            curves.plot(steps, values, marker="o", label=run.label)
        _percent(curves, "While training (validation images)", HEADLINES[name])
        _over_steps(curves)
        _before_and_after(bars, runs, HEADLINES[name])


def plot_measures(runs: Sequence[Compared], titles: Mapping[str, str], title: str, path: Path) -> None:
    """Plot metrics that were measured during training (name -> title) side by side, a line per method."""
    with figure_file(path, (6 * len(titles), 4.6), title, layout="constrained") as figure:
        for axes, (name, words) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
            for run in runs:
                steps, values = evaluations(run.metrics, name)
                axes.plot(steps, values, marker="o", label=run.label)
            axes.set(title=words.capitalize(), ylabel=words)
            axes.set_ylim(bottom=0)
            if not smaller_is_better(name):
                axes.set_ylim(top=1.06)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            _over_steps(axes)


def _before_and_after(axes: Axes, runs: Sequence[Compared], ylabel: str) -> None:
    """Draw one grey bar for the base model and one bar per method, in the colours of the curves, for every task."""
    tasks = list(runs[0].accuracies)
    width = 0.8 / (len(runs) + 1)
    base = [before for before, _ in runs[0].accuracies.values() if before is not None]
    bars = [(base, "#bbbbbb")] if base else []
    for number, run in enumerate(runs):
        bars.append(([run.accuracies[task][1] for task in tasks], f"C{number}"))
    for position, (heights, colour) in enumerate(bars):
        places = [number + position * width for number in range(len(tasks))]
        drawn = axes.bar(places, heights, width * 0.92, color=colour)
        axes.bar_label(drawn, [f"{height:.0%}" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(
        [number + width * len(runs) / 2 for number in range(len(tasks))],
        ["\n".join(wrap(plain(printable(task)), _LABEL)) for task in tasks],
    )
    axes.grid(axis="x", visible=False)
    _percent(axes, "After training (grey: before)" if base else "After training", ylabel)


def _over_steps(axes: Axes, legend: bool = True) -> None:
    """Label the horizontal axis with optimiser steps, and the lines if there are any."""
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if legend and len(axes.get_lines()) > _INSIDE:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    elif legend and axes.get_lines():
        axes.legend()


def _percent(axes: Axes, title: str, ylabel: str) -> None:
    axes.set(title=title, ylabel=ylabel, ylim=(0, 1.06))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
