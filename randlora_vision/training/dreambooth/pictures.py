"""The figures of a DreamBooth run: samples of the base and the adapted pipeline over training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from randlora_vision.files.atomic import replacing
from randlora_vision.training.dreambooth.methods import PipelineAdaptation
from randlora_vision.training.dreambooth.samples import Gallery, as_image
from randlora_vision.training.evaluation.plots import save_figure
from randlora_vision.training.harness.run_folder import RunFolder

Row = tuple[str, Sequence[Any]]  # a label and images


def plot_samples(groups: Sequence[tuple[str, Sequence[Row]]], title: str, path: Path) -> None:
    """Plot labelled rows of images in groups, each group below its heading."""
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


_BASE = "base"
Report = Callable[[int, Sequence[Path]], None]  # step, PNG files


class Album:
    """Writes the pictures of a gallery, base and adapted, to a run folder and to the trackers.

    Every picture is also saved as samples/<step>/<prompt>-<number>.png, so a resumed run can include all of them in the
    final figure.
    """

    def __init__(self, run: RunFolder, gallery: Gallery, adaptation: PipelineAdaptation, report: Report) -> None:
        self.run = run
        self.gallery = gallery
        self.adaptation = adaptation
        self.report = report

    def show(self, step: int) -> None:
        """Generate pictures with the file that was just saved, and plot them together with those of the base."""
        if step == 0:
            return  # the adapter is untrained
        with self.adaptation.with_saved(self.run.adapter):
            write_pictures(self.run, _name(step), self.gallery.draw())
        path = self.run.sample_folder / _name(step) / "base-and-adapted.png"  # trackers use the file name as the title
        self._plot({"base": _BASE, "adapted": _name(step)}, f"Base and adapted after {step} steps, same seeds", path)
        self.report(step, [path])

    def finish(self, steps: Sequence[int]) -> None:
        """Plot the samples over training in one figure."""
        rows = {"base": _BASE, **{f"step {step}": _name(step) for step in steps if step}}
        self._plot(rows, "Samples over training, same seeds", self.run.samples)

    def _plot(self, rows: dict[str, str], title: str, path: Path) -> None:
        groups = [
            (prompt, [(label, self._read(folder, number)) for label, folder in rows.items()])
            for number, prompt in enumerate(self.gallery.prompts)
        ]
        plot_samples(groups, title, path)

    def _read(self, folder: str, prompt: int) -> list[Any]:
        pictures = []
        for number in range(self.gallery.each):
            with Image.open(_path(self.run, folder, prompt, number)) as image:
                pictures.append(image.convert("RGB"))
        return pictures


def write_base_pictures(run: RunFolder, gallery: Gallery) -> None:
    """Write the pictures of the pipeline before it is adapted."""
    write_pictures(run, _BASE, gallery.draw())


def write_pictures(run: RunFolder, name: str, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write each picture of each prompt to the sample folder `name`."""
    for prompt, pictures in enumerate(rows):
        for number, picture in enumerate(pictures):
            with replacing(_path(run, name, prompt, number)) as temporary:
                as_image(picture).save(temporary)


def _path(run: RunFolder, folder: str, prompt: int, number: int) -> Path:
    return run.sample_folder / folder / f"{prompt}-{number}.png"


def _name(step: int) -> str:
    return f"step-{step:06}"
