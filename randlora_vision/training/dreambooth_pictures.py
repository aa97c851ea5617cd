"""The pictures that a run leaves: samples of the base, of the saved file at every evaluation, and all over training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from randlora_vision.files import replacing
from randlora_vision.training.diffusion_methods import PipelineAdaptation
from randlora_vision.training.diffusion_plots import plot_samples
from randlora_vision.training.diffusion_samples import Gallery, as_image
from randlora_vision.training.run_folder import RunFolder

_BASE = "base"

Report = Callable[[int, Sequence[Path]], None]  # step, PNG files


class Album:
    """Writes what a gallery shows, base against adapted, to a run folder and to the trackers.

    Every picture is a file too, samples/<step>/<prompt>-<number>.png, so a run that goes on later has
    all of them for its last figure.
    """

    def __init__(self, run: RunFolder, gallery: Gallery, adaptation: PipelineAdaptation, report: Report) -> None:
        self.run = run
        self.gallery = gallery
        self.adaptation = adaptation
        self.report = report

    def show(self, step: int) -> None:
        """Draw from the file that was just saved, loaded anew, beside the base's pictures."""
        if step == 0:
            return  # it is the base
        with self.adaptation.lent(self.run.adapter):
            write_pictures(self.run, _name(step), self.gallery.draw())
        path = self.run.sample_folder / _name(step) / "base-and-adapted.png"  # trackers go by the file's name
        self._plot({"base": _BASE, "adapted": _name(step)}, f"Base and adapted after {step} steps, same seeds", path)
        self.report(step, [path])

    def finish(self, steps: Sequence[int]) -> None:
        """Draw the samples over training in one figure."""
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
    """Write what the pipeline draws before it is adapted."""
    write_pictures(run, _BASE, gallery.draw())


def write_pictures(run: RunFolder, name: str, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write each picture of each prompt to a folder of that name."""
    for prompt, pictures in enumerate(rows):
        for number, picture in enumerate(pictures):
            with replacing(_path(run, name, prompt, number)) as temporary:
                as_image(picture).save(temporary)


def _path(run: RunFolder, folder: str, prompt: int, number: int) -> Path:
    return run.sample_folder / folder / f"{prompt}-{number}.png"


def _name(step: int) -> str:
    return f"step-{step:06}"
