"""Reproducible sampling from a pipeline during training."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.buckets import Size
from randlora_vision.training.dreambooth.families import Encoded, Family, Seen
from randlora_vision.training.dreambooth.shown import Shown

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Sampler:
    """Generates pictures of one size with the current weights of a pipeline."""

    def __init__(
        self,
        family: Family,
        size: Size,
        at_once: int,
        autocast: Autocast,
        steps: int | None,
        guidance: float | None,
        shown: Shown | None = None,
    ) -> None:
        self.family = family
        self.size = size
        self.at_once = 1 if family.one_at_a_time else at_once
        self.autocast = autocast
        self.shown = shown
        self.settings: dict[str, Any] = {}
        if steps is not None:
            self.settings["num_inference_steps"] = steps
        if guidance is not None:
            self.settings["guidance_scale"] = guidance

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Encode prompts, one per picture, for guided sampling."""
        if self.family.sees:
            assert self.shown is not None
            given = self.shown[1] if self.shown[1].ndim == 5 else self.shown[1][:, None]
            images = [[as_image(image / 2 + 0.5) for image in some] for some in given]
            prompts = [Seen(prompt, images[number % len(images)]) for number, prompt in enumerate(prompts)]
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
                    start,
                )
                for start in range(0, len(seeds), self.at_once)
            ]
        )

    def of_text(self) -> "Sampler":
        """Return a sampler of whole pictures: by inpainting, it makes all of a grey image anew."""
        if self.shown is None:
            return self
        other = copy.copy(self)
        other.shown = torch.zeros(1, 3, *self.size), torch.ones(1, 1, *self.size)
        return other

    def _draw_few(self, encoded: Encoded, seeds: Sequence[int], start: int) -> Tensor:
        family, (height, width) = self.family, self.size
        for denoiser in family.denoisers.values():
            denoiser.eval()
        # Use a second pipeline, as the scheduler keeps state; text encoders are not needed and may be elsewhere.
        view = family.like(**dict.fromkeys(family.text_encoder_names))
        view.set_progress_bar_config(disable=True)
        generators = [
            torch.Generator().manual_seed(seed) for seed in seeds
        ]  # on the CPU, so samples do not depend on the device
        settings = dict(self.settings)
        if self.shown is not None:
            rows = torch.arange(start, start + len(seeds)) % len(self.shown[0])
            settings |= family.shown(*(images[rows].to(family.device) for images in self.shown))
        with self.autocast():
            latents = family.generate(view, encoded, height, width, generator=generators, **settings)
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
    """Return a picture (3, h, w) between 0 and 1 as a PIL image; of a clip (3, F, h, w), three frames side by side."""
    from torchvision.transforms.functional import to_pil_image

    if picture.ndim == 4:
        last = picture.shape[1] - 1
        picture = torch.cat([picture[:, number] for number in (0, last // 2, last)], dim=2)
    return to_pil_image((picture * 255).round().to(torch.uint8))


def largest_difference(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest pixel difference between the pictures of two galleries, for pixels in [0, 1]."""
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def quoted(prompts: Sequence[str]) -> str:
    """Return a prompt in quotes, or the first of several and how many there are."""
    return repr(prompts[0]) + (f" and {len(prompts) - 1} other prompts" if len(prompts) > 1 else "")
