"""The pictures of a run that trains a pipeline: samples beside those of the base, and over training, and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from randlora_vision.training.plots import Metrics, over_steps, save_figure, series

Row = tuple[str, Sequence[Any]]  # a label and images


def plot_samples(groups: Sequence[tuple[str, Sequence[Row]]], title: str, path: Path) -> None:
    """Draw rows of images, each with its label; groups of rows follow each other, each under its own heading."""
    columns = max(len(images) for _, rows in groups for _, images in rows)
    count = sum(len(rows) for _, rows in groups)
    side, label, heading = 1.1, 1.5, 0.45  # inches
    width, height = label + side * columns + 0.1, side * count + heading * len(groups) + 0.4
    figure = Figure(figsize=(max(width, 5.0), height))
    top = height - 0.35
    for name, rows in groups:
        figure.text(0.02, (top - heading * 0.6) / height, name, fontsize=10, fontweight="bold", va="center")
        top -= heading
        for text, images in rows:
            figure.text((label - 0.1) / figure.get_figwidth(), (top - side / 2) / height, text, ha="right", va="center")
            for column, image in enumerate(images):
                left = (label + column * side) / figure.get_figwidth()
                box = (left, (top - side) / height, 0.96 * side / figure.get_figwidth(), 0.96 * side / height)
                axes = figure.add_axes(box)
                axes.imshow(image, interpolation="nearest")
                axes.set_axis_off()
            top -= side
    save_figure(figure, title, path)


def plot_losses(metrics: Metrics, title: str, path: Path) -> None:
    """Draw the losses and the learning rate over the steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, rate = figure.subplots(1, 2, width_ratios=(3, 2))
    loss.plot(*series(metrics, "train", "loss"), alpha=0.5, label="training batches (random noise levels)")
    for name, label in (("loss", "instance images, fixed noise"), ("prior_loss", "class images, fixed noise")):
        steps, values = series(metrics, "val", name)
        if steps:
            loss.plot(steps, values, marker="o", markersize=4, label=label)
    loss.set(title="Loss", ylabel="squared error")
    loss.set_ylim(bottom=0)
    loss.legend(fontsize=8)
    rate.plot(*series(metrics, "train", "lr"), color="#7f7f7f")
    rate.set(title="Learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, rate):
        over_steps(axes)
    save_figure(figure, title, path)
