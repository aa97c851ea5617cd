"""The figures of a DreamBooth run: samples of the base and the adapted pipeline over training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from randlora_vision.files.atomic import replacing
from randlora_vision.training.data.decode import Colour
from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.methods import PipelineAdaptation
from randlora_vision.training.dreambooth.samples import Gallery, as_image
from randlora_vision.training.evaluation.grids import evenly, plot_samples, plot_sheet
from randlora_vision.training.harness.run_folder import RunFolder

_INSTANCES = 4  # instance images in a figure, or as many as samples of a prompt
_BESIDE = 4  # instance images in the sheet for each of its rows
_COLUMNS = 5  # most steps in the sheet; all are kept as files


_BASE = "base"
Report = Callable[[int, Sequence[Path]], None]  # step, PNG files


class Album:
    """Writes the pictures of a gallery, base and adapted, to a run folder and to the trackers.

    Every picture is also saved as samples/<step>/<prompt>-<number>.png, so a resumed run can include all of them in the
    final figure.
    """

    def __init__(
        self,
        run: RunFolder,
        instances: Sequence[Picture],
        gallery: Gallery,
        adaptation: PipelineAdaptation,
        report: Report,
        background: Colour,
    ) -> None:
        self.run = run
        self.instances = instances
        self.gallery = gallery
        self.adaptation = adaptation
        self.report = report
        self.background = background

    def show(self, step: int) -> None:
        """Generate pictures with the file that was just saved, and plot them together with those of the base."""
        if step == 0:
            return  # the adapter is untrained
        with self.adaptation.with_saved(self.run.adapter):
            write_pictures(self.run, _name(step), self.gallery.draw(), self.gallery.sampler.family.frame_rate)
        path = self.run.sample_folder / _name(step) / "base-and-adapted.png"  # trackers use the file name as the title
        self._plot({"base": _BASE, "adapted": _name(step)}, f"Base and adapted after {step} steps, same seeds", path)
        self.report(step, [path])

    def finish(self, steps: Sequence[int]) -> None:
        """Plot the samples over training as a contact sheet, beside the instance images."""
        shown = evenly([step for step in steps if step], _COLUMNS)
        columns = {"base": _BASE, **{f"step {step}": _name(step) for step in shown}}
        rows = [
            (prompt, [self._read(folder, number) for folder in columns.values()])
            for number, prompt in enumerate(self.gallery.prompts)
        ]
        beside = ("instance images", self._instances(_BESIDE * len(rows)))
        plot_sheet(beside, list(columns), rows, "Samples over training, same seeds", self.run.samples)

    def _instances(self, most: int) -> list[Image.Image]:
        pictures = (read_picture(image, self.background) for image in self.instances[:most])
        return [ImageOps.fit(picture, (256, 256)) for picture in pictures]

    def _plot(self, rows: dict[str, str], title: str, path: Path) -> None:
        groups = [("instance images", [("", self._instances(max(self.gallery.each, _INSTANCES)))])]
        for number, prompt in enumerate(self.gallery.prompts):
            groups.append((prompt, [(label, self._read(folder, number)) for label, folder in rows.items()]))
        plot_samples(groups, title, path)

    def _read(self, folder: str, prompt: int) -> list[Any]:
        pictures = []
        for number in range(self.gallery.each):
            with Image.open(_path(self.run, folder, prompt, number)) as image:
                pictures.append(image.convert("RGB"))
        return pictures


def write_base_pictures(run: RunFolder, gallery: Gallery) -> None:
    """Write the pictures of the pipeline before it is adapted."""
    write_pictures(run, _BASE, gallery.draw(), gallery.sampler.family.frame_rate)


def write_pictures(run: RunFolder, name: str, rows: Sequence[Sequence[Tensor]], rate: float | None = None) -> None:
    """Write each picture of each prompt to the sample folder `name`; of a clip, three frames and a WebP animation."""
    for prompt, pictures in enumerate(rows):
        for number, picture in enumerate(pictures):
            path = _path(run, name, prompt, number)
            with replacing(path) as temporary:
                as_image(picture).save(temporary)
            if picture.ndim == 4:
                with replacing(path.with_suffix(".webp")) as temporary:
                    _write_clip(temporary, picture, rate)


def _write_clip(path: Path, clip: Tensor, rate: float | None) -> None:
    assert rate is not None
    first, *rest = (as_image(frame) for frame in clip.unbind(1))
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0, lossless=True)


def _path(run: RunFolder, folder: str, prompt: int, number: int) -> Path:
    return run.sample_folder / folder / f"{prompt}-{number}.png"


def _name(step: int) -> str:
    return f"step-{step:06}"
