"""Grids of images: predictions, captions found, and rows of samples. Boxes are placed in inches and do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from randlora_vision.figures import figure_file, plain
from randlora_vision.names import printable

_RIGHT, _WRONG, _QUIET = "#1a7f37", "#c62828", "#666666"
_TITLE = 0.5  # inches, above every grid


def shortened(name: str, most: int = 16) -> str:
    """Return `name`, printable, with at most so many characters, the last one an ellipsis if it was cut."""
    name = printable(name)
    return name if len(name) <= most else name[: most - 1] + "…"


@dataclass(frozen=True)
class Prediction:
    """One image with its class and the model's answers before and after training."""

    picture: Image.Image
    truth: str
    before: str | None  # None where there was no classifier yet
    after: str
    confidence: float  # the probability of the answer after training


def list_predictions(
    pictures: Sequence[Image.Image], truths: Sequence[int], names: Sequence[str], before: Tensor | None, after: Tensor
) -> list[Prediction]:
    """Return the predictions of P pictures with these classes from their logits (P, K) before and after training."""
    chances, answers = after.softmax(dim=1).max(dim=1)
    old = [None] * len(truths) if before is None else [names[answer] for answer in before.argmax(dim=1).tolist()]
    now = [names[answer] for answer in answers.tolist()]
    rows = zip(pictures, truths, old, now, chances.tolist(), strict=True)
    return [Prediction(picture, names[truth], *answered) for picture, truth, *answered in rows]


def mistakes_first(predictions: Sequence[Prediction], most: int) -> list[Prediction]:
    """Return up to `most` predictions: at most two thirds mistakes, most confident first, then correct ones."""
    wrong = sorted((item for item in predictions if item.after != item.truth), key=lambda item: -item.confidence)
    right = [item for item in predictions if item.after == item.truth]
    shown = wrong[: max(most - len(right), 2 * most // 3)]
    return shown + right[: most - len(shown)]


def plot_predictions(
    predictions: Sequence[Prediction], title: str, path: Path, most: int = 24, columns: int = 6
) -> None:
    """Draw a grid of images, mistakes first, each with its class, the two answers and the confidence of the last one.

    Correct answers are green and wrong ones red. The title gets the number of mistakes among all of `predictions`.
    """
    items = mistakes_first(predictions, most)
    rows, columns = _shape(len(items), columns)
    wrong = sum(item.after != item.truth for item in predictions)
    heading = f"{title}: {wrong} of {len(predictions)} wrong, mistakes first"
    side, gap, above, below = 1.45, 0.3, 0.26, 0.42
    size = (max(columns * (side + gap) + gap, 7.5), rows * (side + above + below) + _TITLE + 0.1)
    with figure_file(path, size, heading) as figure:
        for number, item in enumerate(items[: rows * columns]):
            row, column = divmod(number, columns)
            left, top = gap + column * (side + gap), _TITLE + row * (side + above + below)
            _place(figure, left, top + above, side, side).imshow(item.picture)
            middle = left + side / 2
            _write(
                figure, middle, top + above - 0.12, shortened(item.truth), fontsize=9, fontweight="bold", ha="center"
            )
            lines = [("after", item.after, f" {item.confidence:.0%}")]
            if item.before is not None:
                lines.insert(0, ("before", item.before, ""))
            for line, (when, answer, chance) in enumerate(lines):
                right = answer == item.truth
                text = f"{when}: {shortened(answer, 12)} {'✓' if right else '✗'}{chance}"
                place = top + above + side + 0.1 + 0.15 * line
                _write(figure, middle, place, text, fontsize=7, ha="center", color=_RIGHT if right else _WRONG)


@dataclass(frozen=True)
class Found:
    """One image with its caption and the nearest caption by the model, before and after training."""

    picture: Image.Image
    caption: str
    before: tuple[str, bool] | None  # the caption, and whether it is correct; None if not measured
    after: tuple[str, bool]


def plot_found(items: Sequence[Found], title: str, path: Path, columns: int = 2) -> None:
    """Draw images, mistakes first, next to their captions and the retrieved ones: green if correct and red if not."""
    items = sorted(items, key=lambda item: item.after[1])
    rows, columns = _shape(len(items), columns)
    side, gap, words = 1.5, 0.15, 4.3
    size = (columns * (side + words + 2 * gap), rows * (side + gap) + _TITLE + gap)
    with figure_file(path, size, title) as figure:
        for number, item in enumerate(items[: rows * columns]):
            row, column = divmod(number, columns)
            left, top = gap + column * (side + words + 2 * gap), _TITLE + row * (side + gap)
            _place(figure, left, top, side, side).imshow(item.picture)
            lines = [("caption", item.caption, "black")]
            for when, answer in (("before", item.before), ("after", item.after)):
                if answer is not None:
                    text, right = answer
                    lines.append((f"{when} {'✓' if right else '✗'}", text, _RIGHT if right else _WRONG))
            for line, (label, text, colour) in enumerate(lines):
                place = top + 0.06 + 0.48 * line
                _write(figure, left + side + gap, place, label, fontsize=8, va="top", color=_QUIET)
                wrapped = "\n".join(wrap(shortened(text, 96), 50))
                _write(figure, left + side + gap + 0.7, place, wrapped, fontsize=8, va="top", color=colour)


Row = tuple[str, Sequence[Any]]  # a label and images


def plot_samples(groups: Sequence[tuple[str, Sequence[Row]]], title: str, path: Path) -> None:
    """Draw labelled rows of images in groups, each group below its heading."""
    columns = max(len(images) for _, rows in groups for _, images in rows)
    count = sum(len(rows) for _, rows in groups)
    side, label, heading = 1.1, 1.3, 0.35
    size = (max(label + side * columns + 0.1, 5.0), side * count + heading * len(groups) + _TITLE + 0.1)
    with figure_file(path, size, title) as figure:
        top = _TITLE
        for name, rows in groups:
            if name:
                most = int(size[0] * 12)
                _write(figure, 0.1, top + heading / 2, shortened(name, most), fontsize=9, fontweight="bold")
            top += heading
            for text, images in rows:
                _write(figure, label - 0.1, top + side / 2, text, ha="right")
                for column, image in enumerate(images):
                    _place(figure, label + column * side, top, 0.96 * side, 0.96 * side).imshow(image)
                top += side


def plot_sheet(
    beside: tuple[str, Sequence[Any]],
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Sequence[Any]]]],
    title: str,
    path: Path,
) -> None:
    """Draw a contact sheet: a row per prompt with a cell of up to four pictures per column, and images beside it.

    `beside` is a heading with the images to the left, two in a line, of which as many are drawn as fit. All cells have
    as many pictures.
    """
    cell, gap, heading = 1.9, 0.12, 0.3
    each = len(rows[0][1][0])
    tall = cell / 2 if each in (2, 3) else cell
    width = (len(columns) + 1) * (cell + gap) + 3 * gap
    height = _TITLE + heading + len(rows) * (heading + tall) + gap
    with figure_file(path, (max(width, 7.0), height), title) as figure:
        top, left = _TITLE + heading / 2, gap
        _write(figure, left, top, beside[0], fontsize=9, fontweight="bold")
        most = 2 * len(rows) * (2 if tall == cell else 1)
        _tiles(figure, left, _TITLE + 2 * heading, cell / 2, beside[1][:most])
        start = left + cell + 3 * gap
        for number, name in enumerate(columns):
            middle = start + number * (cell + gap) + cell / 2
            _write(figure, middle, top, name, fontsize=9, fontweight="bold", ha="center")
        for row, (prompt, cells) in enumerate(rows):
            top = _TITLE + heading + row * (heading + tall)
            text = shortened(prompt, int((width - start) * 12))
            _write(figure, start, top + heading / 2, text, fontsize=9, color=_QUIET)
            for number, pictures in enumerate(cells):
                side = cell if each == 1 else cell / 2
                shown = pictures[: 4 if tall == cell else 2]
                _tiles(figure, start + number * (cell + gap), top + heading, side, shown)


def _tiles(figure: Any, left: float, top: float, side: float, pictures: Sequence[Any]) -> None:
    for number, picture in enumerate(pictures):
        line, column = divmod(number, 2)
        _place(figure, left + column * side, top + line * side, 0.98 * side, 0.98 * side).imshow(picture)


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """Return up to `most` of the steps, evenly spaced, the last one included."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round((number + 1) * len(steps) / most) - 1] for number in range(most)]


def _shape(count: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of a grid without empty cells: what would fill a part of a row is left out."""
    if count <= columns:
        return 1, count
    columns = min(range(columns, columns // 2, -1), key=lambda number: count % number)
    return count // columns, columns


def _place(figure: Any, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes without a frame; all in inches from the upper left corner."""
    full_width, full_height = figure.get_size_inches()
    box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axes: Axes = figure.add_axes(box)
    axes.set_axis_off()
    return axes


def _write(figure: Any, left: float, top: float, text: str, **style: Any) -> None:
    """Write text; in inches from the upper left corner, vertically centred unless `va` says otherwise."""
    full_width, full_height = figure.get_size_inches()
    figure.text(left / full_width, 1 - top / full_height, plain(text), **{"va": "center", **style})
