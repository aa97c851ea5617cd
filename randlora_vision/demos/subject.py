"""The embedded subject, an inverted seven in five images, and a measure of how well it is learnt."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from randlora_vision.demos.pipelines import CLASS_PROMPT, PIXELS, PROMPTS
from randlora_vision.training.data.sources import digits
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.prior import balance
from randlora_vision.training.dreambooth.samples import Draws, Sampler
from randlora_vision.training.dreambooth.subject import Subject

DIGIT = 7
_IMAGES = 5
_SAMPLES, _SAMPLES_PER_DIGIT = 16, 3  # a few seconds at every evaluation


def demo_subject(options: SubjectOptions) -> Subject:
    """Return five training images of an inverted seven."""
    assert options.instance_prompt is not None
    pictures = digits.read_digits((DIGIT,), inverted=True).images["train"][:_IMAGES]
    return Subject("inverted sevens", [_small(picture) for picture in pictures], [options.instance_prompt] * _IMAGES)


class Judge:
    """Measures a pipeline by a logistic regression of real digits, on pictures whose seeds have no other use."""

    def __init__(self, sampler: Sampler, subject_prompt: str, seed: int, text_trained: bool) -> None:
        own = [prompt for prompt in PROMPTS for _ in range(_SAMPLES_PER_DIGIT)]
        prompts = [subject_prompt] * _SAMPLES + [CLASS_PROMPT] * _SAMPLES + own
        self._draws = Draws(sampler, prompts, range(10_000 + seed, 10_000 + seed + len(prompts)), text_trained)

    def __call__(self) -> dict[str, float]:
        """Return the shares of pictures that are recognised as what their prompts ask for.

        `subject` is that of inverted sevens for the subject's prompt, `class_kept` that of upright digits for the
        class prompt, and `digits_kept` that of the named digit, upright, for the prompts of the ten digits. `balance`
        is the harmonic mean of the first and the last. The numbers of pictures are among the values.
        """
        ten = len(digits.NAMES)
        of_subject, of_class, of_digits = np.split(_judge().predict(_features(self._draws())), [_SAMPLES, 2 * _SAMPLES])
        learnt = float((of_subject == ten + DIGIT).mean())
        kept = float((of_digits == np.repeat(np.arange(ten), _SAMPLES_PER_DIGIT)).mean())
        shares = {"subject": learnt, "class_kept": float((of_class < ten).mean()), "digits_kept": kept}
        counts = {"subject_pictures": _SAMPLES, "class_pictures": _SAMPLES, "digits_pictures": len(of_digits)}
        return {**shares, "balance": balance(learnt, kept), **counts}


@cache
def _judge() -> Any:
    """Return a classifier with 20 classes: the digits 0-9 upright, then inverted."""
    from sklearn.linear_model import LogisticRegression

    features, labels = [], []
    for inverted in (False, True):
        splits = digits.read_digits(inverted=inverted)
        images: Sequence[Any] = [*splits.images["train"], *splits.images["val"]]
        features.append(np.stack([np.asarray(_small(image).convert("L")).ravel() / 255 for image in images]))
        labels += [label + len(digits.NAMES) * inverted for label in (*splits.labels["train"], *splits.labels["val"])]
    return LogisticRegression(max_iter=1000).fit(np.concatenate(features), labels)


def _features(pictures: Tensor) -> np.ndarray:
    """Return the grey values (B, 256) of pictures (B, 3, 16, 16) between 0 and 1."""
    weights = torch.tensor([0.299, 0.587, 0.114])  # as in Pillow
    return torch.einsum("bchw,c->bhw", pictures, weights).flatten(1).numpy()


def _small(picture: Any) -> Image.Image:
    return picture.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
