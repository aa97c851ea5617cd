"""Images of the class of a subject: those of a folder, filled up with generated ones."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from randlora_vision.files.atomic import replacing
from randlora_vision.names import counted
from randlora_vision.training.data.pictures import whole_images
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.caption_folder import read_captions
from randlora_vision.training.dreambooth.families import Encoded
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.samples import Sampler, as_image, quoted
from randlora_vision.training.dreambooth.subject import list_images


class ClassImages:
    """The first `num_class_images` images of a folder with their captions; `make` generates those that are missing.

    Missing ones are of each class prompt in turn. The name of an image contains its number, which is also its seed, so
    an interrupted run can be continued; its prompt is kept in a text file beside it. An image without a caption gets
    the first class prompt.
    """

    def __init__(
        self, options: SubjectOptions, folder: Path, sampler: Sampler, accelerator: Accelerator, skipped: SkipList
    ) -> None:
        self.folder = folder
        self.sampler = sampler.of_text()
        self.accelerator = accelerator
        self.prompts = options.class_prompt
        self.images: list[tuple[Path, str]] = []
        self._missing: list[tuple[int, Path]] = []
        if options.with_prior_preservation:
            folder.mkdir(parents=True, exist_ok=True)
            missing = options.num_class_images - sum(whole_images(list_images(folder, "--class-data-dir"), skipped))
            names = ((number, folder / f"made-{number:05}.png") for number in range(options.num_class_images))
            self._missing = [(number, path) for number, path in names if not path.exists()][: max(0, missing)]
            captioned = read_captions(folder, skipped)
            whole = whole_images([path for path, _ in captioned], skipped)
            found = [
                (path, self.prompts[0] if caption is None else caption)
                for (path, caption), readable in zip(captioned, whole, strict=True)
                if readable
            ]
            found += [(path, self._prompt(number)) for number, path in self._missing]
            self.images = (sorted(found) if self._missing else found)[: options.num_class_images]
            accelerator.wait_for_everyone()  # before the folder changes
        self._own = self._missing[accelerator.process_index :: accelerator.num_processes]
        self._encoded: dict[tuple[str, ...], Encoded] = {}
        for some in self._batches():
            captions = tuple(self._prompt(number) for number, _ in some)
            if captions not in self._encoded:
                self._encoded[captions] = self.sampler.encode(captions)

    def make(self) -> None:
        """Generate the missing images, on all processes; the prompts are already encoded."""
        if self._missing:
            count, prompts = len(self._missing), quoted(self.prompts)
            self.accelerator.print(f"generating {counted(count, 'image')} of {prompts} in {self.folder}")
        quiet = not (self._own and self.accelerator.is_main_process)
        for some in tqdm(self._batches(), disable=quiet):
            captions = tuple(self._prompt(number) for number, _ in some)
            drawn = self.sampler.draw(self._encoded[captions], [number for number, _ in some])
            for (_, path), caption, picture in zip(some, captions, drawn, strict=True):
                with replacing(path.with_suffix(".txt")) as temporary:  # first: an image without it has another caption
                    temporary.write_text(caption, encoding="utf-8")
                with replacing(path) as temporary:
                    as_image(picture).save(temporary)
        self.accelerator.wait_for_everyone()

    def _batches(self) -> Sequence[Sequence[tuple[int, Path]]]:
        size = self.sampler.at_once
        return [self._own[start : start + size] for start in range(0, len(self._own), size)]

    def _prompt(self, number: int) -> str:
        return self.prompts[number % len(self.prompts)]
