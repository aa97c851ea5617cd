"""Sampling from a pipeline while it is trained: the same pictures for the same weights and seeds."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_vision.training.diffusion_buckets import Size
from randlora_vision.training.diffusion_families import Encoded, Family

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Sampler:
    """Draws pictures of one size from a family's pipeline as it is at the moment."""

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
        """Encode prompts, one a picture, for guided sampling."""
        for name in self.family.text_encoder_names:
            encoder = getattr(self.family.pipe, name)
            if encoder is not None:
                encoder.eval()
        with self.autocast():
            return self.family.encode(prompts, guided=True)

    @torch.no_grad()
    def draw(self, encoded: Encoded, seeds: Sequence[int]) -> Tensor:
        """Return a picture for each encoded prompt and its seed (B, 3, h, w), float32 between 0 and 1, on the CPU."""
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
        # The scheduler keeps state while it samples; encoders are not needed, and may be elsewhere.
        idle = dict.fromkeys(family.text_encoder_names)
        view = type(family.pipe)(**{**family.pipe.components, **idle, **family.loading})
        view.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device
        size = {"height": height, "width": width}
        with self.autocast():
            latents = view(**encoded, **self.settings, **size, generator=generators, output_type="latent").images
        return family.decode(family.unpack(latents, height, width)).cpu()


class Gallery:
    """The pictures of validation: so many of each prompt, from the same seeds whenever they are drawn."""

    def __init__(self, sampler: Sampler, prompts: Sequence[str], each: int, seed: int, text_trained: bool) -> None:
        self.sampler = sampler
        self.prompts = list(prompts)
        self.each = each
        self.seeds = [seed + number for _ in prompts for number in range(each)]
        self._texts = [prompt for prompt in prompts for _ in range(each)]
        self._encoded = None if text_trained else self._encode()

    def _encode(self) -> Encoded | None:
        return self.sampler.encode(self._texts) if self._texts else None

    def draw(self) -> list[list[Tensor]]:
        """Return a row of pictures (3, h, w) for each prompt."""
        encoded = self._encoded or self._encode()
        if encoded is None:
            return []
        pictures = self.sampler.draw(encoded, self.seeds)
        return [list(pictures[start : start + self.each]) for start in range(0, len(pictures), self.each)]


def as_image(picture: Tensor) -> Any:
    """Return a picture (3, h, w) between 0 and 1 as a PIL image."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image((picture * 255).round().to(torch.uint8))


def largest_difference(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest difference of a pixel between two galleries' pictures, of the range 0 to 1."""
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
