"""Reproducible sampling from a pipeline during training, and generated images of the class of the subject."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from randlora_vision.files.atomic import replacing
from randlora_vision.training.data.pictures import whole_images
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.caption_folder import read_captions
from randlora_vision.training.dreambooth.buckets import Size
from randlora_vision.training.dreambooth.families import Encoded, Family
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.subject import list_images

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Sampler:
    """Generates pictures of one size with the current weights of a pipeline."""

    def __init__(
        self, family: Family, size: Size, at_once: int, autocast: Autocast, steps: int | None, guidance: float | None
    ) -> None:
        self.family = family
        self.size = size
        self.at_once = at_once
        self.autocast = autocast
        self.settings: dict[str, Any] = {}
        if steps is not None:
            self.settings["num_inference_steps"] = steps
        if guidance is not None:
            self.settings["guidance_scale"] = guidance

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Encode prompts, one per picture, for guided sampling."""
        for name in self.family.text_encoder_names:
            encoder = getattr(self.family.pipe, name)
            if encoder is not None:
                encoder.eval()
        with self.autocast():
            return self.family.encode(prompts, guided=True)

    @torch.no_grad()
    def draw(self, encoded: Encoded, seeds: Sequence[int]) -> Tensor:
        """Return one picture per encoded prompt and seed (B, 3, h, w), float32 between 0 and 1, on the CPU."""
        return torch.cat(
            [
                self._draw_few(
                    {name: tensor[start : start + self.at_once] for name, tensor in encoded.items()},
                    seeds[start : start + self.at_once],
                )
                for start in range(0, len(seeds), self.at_once)
            ]
        )

    def _draw_few(self, encoded: Encoded, seeds: Sequence[int]) -> Tensor:
        family, (height, width) = self.family, self.size
        family.denoiser.eval()
        # Use a second pipeline, as the scheduler keeps state; text encoders are not needed and may be elsewhere.
        idle = dict.fromkeys(family.text_encoder_names)
        view = type(family.pipe)(**{**family.pipe.components, **idle, **family.loading})
        view.set_progress_bar_config(disable=True)
        generators = [
            torch.Generator().manual_seed(seed) for seed in seeds
        ]  # on the CPU, so samples do not depend on the device
        with self.autocast():
            latents = family.generate(view, encoded, height, width, generator=generators, **self.settings)
        return family.decode(latents).cpu()


class Draws:
    """Pictures for fixed prompts (encoded once, unless text encoders are trained) and seeds, made at every call."""

    def __init__(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], text_trained: bool) -> None:
        self.sampler = sampler
        self.prompts = list(prompts)
        self.seeds = list(seeds)
        self._encoded = None if text_trained else sampler.encode(self.prompts)

    def __call__(self) -> Tensor:
        """Return one picture per prompt (B, 3, h, w), float32 between 0 and 1, on the CPU."""
        return self.sampler.draw(self._encoded or self.sampler.encode(self.prompts), self.seeds)


class Gallery:
    """The validation pictures: `each` per prompt, generated from the same seeds every time."""

    def __init__(self, sampler: Sampler, prompts: Sequence[str], each: int, seed: int, text_trained: bool) -> None:
        self.sampler = sampler
        self.prompts = list(prompts)
        self.each = each
        seeds = [seed + number for _ in prompts for number in range(each)]
        self._draws = Draws(sampler, [prompt for prompt in prompts for _ in range(each)], seeds, text_trained)

    def draw(self) -> list[list[Tensor]]:
        """Return a row of pictures (3, h, w) for each prompt."""
        pictures = self._draws()
        return [list(pictures[start : start + self.each]) for start in range(0, len(pictures), self.each)]


def as_image(picture: Tensor) -> Any:
    """Return a picture (3, h, w) between 0 and 1 as a PIL image."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image((picture * 255).round().to(torch.uint8))


def largest_difference(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest pixel difference between the pictures of two galleries, for pixels in [0, 1]."""
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def class_images(
    options: SubjectOptions, folder: Path, sampler: Sampler, accelerator: Accelerator, skipped: SkipList
) -> list[tuple[Path, str]]:
    """Return the first `num_class_images` images of the folder, each with its caption.

    All processes generate the missing ones, for each class prompt in turn. The name of an image contains its number,
    which is also its seed, so an interrupted run can be continued; its prompt is kept in a text file beside it. An
    image without a caption gets the first class prompt.
    """
    if not options.with_prior_preservation:
        return []
    prompts = options.class_prompt
    folder.mkdir(parents=True, exist_ok=True)
    missing = options.num_class_images - sum(whole_images(list_images(folder, "--class-data-dir"), skipped))
    names = ((number, folder / f"made-{number:05}.png") for number in range(options.num_class_images))
    accelerator.wait_for_everyone()  # before the folder changes
    wanted = [(number, path) for number, path in names if not path.exists()][: max(0, missing)]
    own = wanted[accelerator.process_index :: accelerator.num_processes]
    if wanted:
        accelerator.print(f"generating {len(wanted)} images of {quoted(prompts)} in {folder}")
    for start in tqdm(range(0, len(own), sampler.at_once), disable=not (own and accelerator.is_main_process)):
        some = own[start : start + sampler.at_once]
        captions = [prompts[number % len(prompts)] for number, _ in some]
        drawn = sampler.draw(sampler.encode(captions), [number for number, _ in some])
        for (_, path), caption, picture in zip(some, captions, drawn, strict=True):
            with replacing(path.with_suffix(".txt")) as temporary:  # first: a caption without an image is made anew
                temporary.write_text(caption, encoding="utf-8")
            with replacing(path) as temporary:
                as_image(picture).save(temporary)
    accelerator.wait_for_everyone()
    found = read_captions(folder, skipped)
    whole = whole_images([path for path, _ in found], skipped)
    found = [item for item, readable in zip(found, whole, strict=True) if readable][: options.num_class_images]
    return [(path, prompts[0] if caption is None else caption) for path, caption in found]


def quoted(prompts: Sequence[str]) -> str:
    """Return a prompt in quotes, or the first of several and how many there are."""
    return repr(prompts[0]) + (f" and {len(prompts) - 1} other prompts" if len(prompts) > 1 else "")
