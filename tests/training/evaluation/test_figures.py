"""Every figure, measured as drawn: labels, units, legends that match the lines, no overlap, nothing empty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from randlora_vision.cli.spectra import Layer, plot_spectra
from randlora_vision.figures import figure_file
from randlora_vision.report import Target
from randlora_vision.training.evaluation.curves import (
    Compared,
    plot_comparison,
    plot_confusion,
    plot_curves,
    plot_measures,
    plot_scales,
    smoothed,
)
from randlora_vision.training.evaluation.grids import (
    Found,
    Prediction,
    evenly,
    list_predictions,
    mistakes_first,
    plot_found,
    plot_predictions,
    plot_samples,
    plot_sheet,
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test writes, each checked instead of being saved."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        check(figure)
        path.touch()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def check(figure: Figure) -> None:
    """Hold what every figure promises."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    page = figure.bbox
    unseen = {label for axes in figure.axes if axes.axison for label in labels_outside(axes)}
    texts = [text for text in texts_of(figure) if is_shown(text) and text not in unseen]
    boxes = {text: text.get_window_extent(renderer) for text in texts}
    for text, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
    level = [(text, box) for text, box in boxes.items() if text.get_rotation() % 90 == 0]
    for (one, a), (other, b) in combinations(level, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1, f"{one.get_text()!r} overlaps {other.get_text()!r}"
    for axes in figure.axes:
        if not axes.axison:
            assert axes.images, "an empty cell"
            image = axes.images[0].get_window_extent(renderer)
            for text, box in boxes.items():
                apart = box.x1 <= image.x0 or image.x1 <= box.x0 or box.y1 <= image.y0 + 1 or image.y1 <= box.y0 + 1
                assert apart, f"{text.get_text()!r} is on an image"
            continue
        assert axes.get_ylabel(), "no y label"
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>" or axes.patches, "no x label"
        if axes.get_lines():
            check_lines(axes)
        else:
            assert axes.images or axes.patches or axes.collections, "an empty panel"


def check_lines(axes: Any) -> None:
    named = {line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")}
    legend = axes.get_legend()
    if legend is not None:
        assert {text.get_text() for text in legend.get_texts()} == named
    else:
        assert len(axes.get_lines()) <= 1 or not named
    low, high = sorted(axes.get_ylim())
    assert high / max(low, 1e-12) > 1.05 or high - low > 0.05, "an axis that shows no difference"
    for line in axes.get_lines():
        steps, values = line.get_xdata(), line.get_ydata()
        assert len(steps) and all(math.isfinite(value) for value in values)
        assert len(steps) > 1 or line.get_marker() not in ("", "None"), f"{line.get_label()!r} cannot be seen"
        assert any(low <= value <= high for value in values), f"{line.get_label()!r} is outside"


def labels_outside(axes: Any) -> Iterator[Text]:
    """Tick labels that matplotlib keeps but does not draw."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for minor in (False, True):
            for place, label in zip(axis.get_ticklocs(minor=minor), axis.get_ticklabels(minor=minor), strict=False):
                if not low <= place <= high:
                    yield label


def texts_of(figure: Figure) -> Iterator[Any]:
    """Without the ticks of axes that are off: matplotlib would make them now, for a second with many pictures."""
    for child in figure.get_children():
        if isinstance(child, Axes) and not child.axison:
            yield from (artist for artist in child.get_children() if isinstance(artist, Text))
        else:
            yield from child.findobj(Text)


def is_shown(text: Any) -> bool:
    return text.get_visible() and bool(text.get_text().strip()) and (text.axes is None or text.axes.axison)


def run_of(steps: int, every: int = 10, **values: float) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run, its validation values moving a little at each evaluation."""
    train = [
        {"split": "train", "step": step, "loss": 2.0 + math.sin(step), "lr": 1e-3 / step, "lr_head": 3e-3 / step}
        for step in range(1, steps + 1)
    ]
    val = [
        {"split": "val", "step": step, **{name: value * (1 + step / 1000) for name, value in values.items()}}
        for step in range(0, steps + 1, every)
    ]
    return [*train, *val]


RECALLS = {f"{way}_r{k}": 0.1 + k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


@pytest.mark.parametrize("steps", [1, 200])
def test_curves(steps: int, tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curves(run_of(steps, top1=0.4, top5=0.8, loss=2.2), "randlora on a model", tmp_path / "a.png")
    plot_curves(run_of(steps, mean_recall=0.3, loss=2.2, **RECALLS), "randlora on a model", tmp_path / "b.png")
    losses = {"loss": "instance images, fixed noise", "prior_loss": "class images, fixed noise"}
    plot_curves(run_of(steps, loss=2.2, prior_loss=1.9), "lora on a pipeline", tmp_path / "c.png", losses)
    shares = {"subject": "learnt", "emoji_kept": "kept", "prior_drift": "other prompts: pixel drift"}
    measured = run_of(steps, loss=2.2, prior_loss=1.9, subject=0.4, emoji_kept=0.9, prior_drift=0.01)
    plot_curves(measured, "lora on a pipeline", tmp_path / "d.png", losses, shares)
    plot_curves(run_of(steps, loss=2.2), "lora on a pipeline", tmp_path / "e.png", losses, shares)
    assert [len(figure.axes) for figure in drawn[3:]] == [3, 2]
    _, _, rate = drawn[0].axes
    assert [text.get_text() for text in rate.get_legend().get_texts()] == ["adapters", "head"]
    assert {"image to text, recall@10", "mean recall"} <= {line.get_label() for line in drawn[1].axes[1].get_lines()}
    low, _ = drawn[2].axes[0].get_ylim()
    assert low > 0.5  # the losses fill the panel


def test_a_smoothed_line_follows_its_values() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    values = [0.0] * 100 + [1.0] * 100
    line = smoothed(values)
    assert line[99] == 0 and 0 < line[110] < line[130] < 1 and line[-1] > 0.95


def picture(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


LONG = "a class with quite a long name"


@pytest.mark.parametrize("count", [1, 11, 96])
@pytest.mark.parametrize("before", [None, LONG])
def test_predictions(count: int, before: str | None, tmp_path: Path, drawn: list[Figure]) -> None:
    answers = [Prediction(picture(), LONG, before, LONG if n % 3 else "other", 0.5 + n / 200) for n in range(count)]
    plot_predictions(answers, "Test images before and after training", tmp_path / "predictions.png")
    assert f"{-(-count // 3)} of {count} wrong" in drawn[0].get_suptitle()


def test_mistakes_come_first_and_the_most_confident_of_them_before_all() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    items = list_predictions([picture()] * 4, [1, 1, 1, 0], ["cat", "dog"], None, logits)
    assert [(item.truth, item.after) for item in items[:2]] == [("dog", "cat"), ("dog", "dog")]
    assert items[0].confidence == pytest.approx(1 / (1 + math.exp(-2)))
    ordered = mistakes_first(items, 4)
    assert [round(item.confidence, 3) for item in ordered] == [0.953, 0.881, 0.881, 0.731]
    assert ordered[-1].after == ordered[-1].truth
    many = [Prediction(picture(), "a", None, "b" if n < 30 else "a", 0.9) for n in range(96)]
    assert [item.after for item in mistakes_first(many, 24)] == ["b"] * 16 + ["a"] * 8
    assert len(mistakes_first(many[:30], 24)) == 24


@pytest.mark.parametrize("count", [1, 5, 12])
def test_found_captions(count: int, tmp_path: Path, drawn: list[Figure]) -> None:
    long = "a rather long caption that goes on about the picture for much longer than anybody would have to"
    items = [Found(picture((30, 60)), long, (long, False), (long, n % 2 == 0)) for n in range(count)]
    plot_found(items, "Test images and nearest captions", tmp_path / "found.png")


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("each", [1, 2, 3, 4, 6])
def test_a_contact_sheet(prompts: int, each: int, tmp_path: Path, drawn: list[Figure]) -> None:
    """Its size does not grow with the pictures of a prompt; nothing overlaps, and no cell is empty."""
    picture = Image.new("RGB", (16, 24))
    columns = ["base", *(f"step {step}" for step in (100, 200, 300))]
    rows = [("a long prompt " * 12, [[picture] * each] * len(columns))] * prompts
    plot_sheet(("instance images", [picture] * 5), columns, rows, "Samples over training", tmp_path / "sheet.png")
    (figure,) = drawn
    shown = {1: 1, 2: 2, 3: 2}.get(each, 4)
    assert len(figure.axes) == shown * prompts * len(columns) + min(5, (2 if shown == 2 else 4) * prompts)
    width, height = figure.get_size_inches()
    assert height < 1 + 2.2 * prompts and width < 12


def test_samples(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [(f"step {step}", [picture()] * 2) for step in evenly(range(100, 2100, 100), 5)]
    groups = [("instance images", [("", [picture((60, 40))] * 4)]), (f"a photo of {LONG} " * 6, rows)]
    plot_samples(groups, "Samples over training", tmp_path / "samples.png")
    assert [label for label, _ in rows] == [f"step {step}" for step in (400, 800, 1200, 1600, 2000)]
    assert evenly([5, 9], 5) == [5, 9]


@pytest.mark.parametrize("classes", [2, 30, 120])
def test_confusion(classes: int, tmp_path: Path, drawn: list[Figure]) -> None:
    counts = [[(row == column) * 9 + 1 for column in range(classes)] for row in range(classes)]
    counts[0] = [0] * classes  # a class without images
    plot_confusion(counts, [f"{LONG} {n}" for n in range(classes)], "Answers on the test images", tmp_path / "c.png")


METHODS = ("RandLoRA (36,864 trained)", "LoRA (32,768 trained)", "full fine-tuning (1,648,640 trained)")


def test_scales_and_comparison(tmp_path: Path, drawn: list[Figure]) -> None:
    values = {"digits 0-9": [0.1, 0.5, 0.9], "digits 0-4": [0.98, 0.8, 0.3]}
    plot_scales([0, 0.5, 1], values, "top-1 accuracy", "Top-1 accuracy between base and adapted", tmp_path / "s.png")
    accuracies = {"inverted digits": (0.1, 0.6), "upright digits": (0.9, 0.3)}
    runs = [Compared(label, run_of(30, top1=0.4), accuracies) for label in METHODS]
    plot_comparison(runs, "a model adapted to digits", tmp_path / "comparison.png")
    runs = [Compared(label, run_of(30, subject=0.4, prior_drift=0.05), {}) for label in METHODS]
    titles = {"subject": "pictures of the subject recognised", "prior_drift": "pixel drift of other prompts"}
    plot_measures(runs, titles, "a subject taught to a pipeline", tmp_path / "measures.png")


@pytest.mark.parametrize("layers", [0, 3, 40])
def test_spectra(layers: int, tmp_path: Path, drawn: list[Figure]) -> None:
    values = torch.logspace(0, -3, 16, dtype=torch.float64)
    named = [Target(f"blocks.{n}.attn.qkv.weight", "linear", (16, 48), 4, 4.0, 4) for n in range(layers)]
    plot_spectra([Layer(target, values) for target in named], "adapter.safetensors", tmp_path / "spectra.png")
    if layers:
        low, _ = drawn[0].axes[0].get_ylim()
        assert 1e-4 < low < 1e-3  # what is drawn fills the panel


def test_nothing_is_written_when_drawing_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), figure_file(tmp_path / "x.png", (3, 3), "title"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_dollar_signs_and_control_characters_are_text(tmp_path: Path, drawn: list[Figure]) -> None:
    """To matplotlib, what is between two dollar signs is a formula, and an unknown one is an error."""
    odd = r"$5 \x $ or $7"
    picture = Image.new("RGB", (4, 4))
    answers = [Prediction(picture, odd, None, odd, 0.5)]
    plot_predictions(answers, odd, tmp_path / "a.png")
    plot_found([Found(picture, odd, None, (odd + "\n\x07", True))], odd, tmp_path / "b.png")
    plot_confusion([[1, 0], [0, 1]], [odd, "b"], odd, tmp_path / "c.png")
    plot_scales([0.0, 1.0], {odd: [0.1, 0.5]}, "recall", odd, tmp_path / "d.png")
    plot_samples([(odd, [("step 1", [picture])])], odd, tmp_path / "e.png")
    runs = [Compared("RandLoRA", run_of(20, top1=0.4), {odd: (0.1, 0.5)})]
    plot_comparison(runs, odd, tmp_path / "f.png")
    assert len(drawn) == 6
