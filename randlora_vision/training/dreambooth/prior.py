"""What an adapter does to prompts that are not the subject's: pictures of the base against those of the adapted model.

Shapes: B pictures of 3 x h x w between 0 and 1; F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora_vision.errors import failures
from randlora_vision.training.data.decode import Colour
from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.buckets import fit
from randlora_vision.training.dreambooth.options import DreamBoothSettings
from randlora_vision.training.dreambooth.samples import Draws, Sampler

PROMPTS = ("a photo of a person", "a photo of a house", "a drawing of a tree", "a bowl of fruit")
"""The prompts of the prior where nothing says what the class is: what any model for text can draw."""
_FIRST_SEED = 20_000  # apart from the seeds of the other pictures


class Encoder:
    """A frozen model of timm that turns pictures into features of unit length, such as DINOv2."""

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"--likeness-encoder needs timm: pip install 'randlora_vision[timm]' ({error})") from error
        with failures(f"--likeness-encoder {name} cannot be loaded"):
            model = timm.create_model(name, pretrained=True, num_classes=0)
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device
        self.config: dict[str, Any] = timm.data.resolve_data_config({}, model=model)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the features (B, F) of pictures (B, 3, h, w), or of the middle frames of clips, float32 on the CPU."""
        if pictures.ndim == 5:
            pictures = pictures[:, :, pictures.shape[2] // 2]
        mean, std = (torch.tensor(self.config[name]).view(3, 1, 1) for name in ("mean", "std"))
        size = self.config["input_size"][1:]
        resized = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(self.model(((resized - mean) / std).to(self.device)).float().cpu(), dim=1)


class PriorMeasure:
    """Measures the drift of the prior and, with an encoder, the similarity to the subject."""

    def __init__(
        self,
        prior: Draws,
        subject: Draws | None = None,
        encoder: Encoder | None = None,
        instances: Tensor | None = None,
    ) -> None:
        self.prior = prior
        self.subject = subject
        self.encoder = encoder
        self.base: Tensor | None = None
        self.features: Tensor | None = None
        self.instances = None if encoder is None or instances is None else encoder(instances)

    def begin(self) -> None:
        """Draw the pictures of the base, before it is adapted."""
        self.base = self.prior()
        self.features = None if self.encoder is None else self.encoder(self.base)

    def __call__(self) -> dict[str, float]:
        """Return the measures of the current weights, after `begin`.

        `prior_drift` is the root mean square of the difference between the pixels of the base and of the current
        pictures, of which there are `prior_pictures`. With an encoder, `prior_likeness` is the mean cosine between the
        features of the two, `subject_likeness` that between all pictures of the subject and all of its images (the DINO
        score of DreamBooth), and `balance` the harmonic mean of both.
        """
        pictures = self.prior()
        assert self.base is not None
        drift = float((pictures - self.base).square().mean().sqrt())
        values = {"prior_drift": drift, "prior_pictures": len(pictures)}
        if self.encoder is not None and self.subject is not None:
            assert self.features is not None and self.instances is not None
            kept = float((self.encoder(pictures) * self.features).sum(1).mean())
            alike = float((self.encoder(self.subject()) @ self.instances.T).mean())
            values |= {"prior_likeness": kept, "subject_likeness": alike, "balance": balance(kept, alike)}
        return values


def balance(one: float, other: float) -> float:
    """Return the harmonic mean of two shares or similarities; 0 if one of them is not above 0."""
    return 2 * one * other / (one + other) if min(one, other) > 0 else 0.0


def prior_measure(
    sampler: Sampler, settings: DreamBoothSettings, caption: str, images: Sequence[Picture], background: Colour
) -> PriorMeasure | None:
    """Return the measure that the options ask for, or None; `caption` and `images` are those of the subject."""
    validation, seed = settings.validation, settings.training.seed
    prompts = validation.prior_prompt or settings.subject.class_prompt or PROMPTS
    asked = validation.validation_prompt or validation.prior_prompt or validation.likeness_encoder
    count, trained = validation.num_prior_images, settings.pipeline.train_text_encoder
    if not (asked and count):
        return None
    seeds = range(_FIRST_SEED + seed, _FIRST_SEED + seed + count)
    prior = Draws(sampler, [prompts[number % len(prompts)] for number in range(count)], seeds, trained)
    if validation.likeness_encoder is None:
        return PriorMeasure(prior)
    encoder = Encoder(validation.likeness_encoder, sampler.family.device)
    pixels = [_square(read_picture(image, background), sampler.size) for image in images]
    return PriorMeasure(prior, Draws(sampler, [caption] * count, seeds, trained), encoder, torch.stack(pixels))


def _square(picture: Any, size: tuple[int, int]) -> Tensor:
    """Return an image, cropped at the center, as pixels (3, h, w) between 0 and 1."""
    return fit(picture, size, center_crop=True)[0] / 2 + 0.5
