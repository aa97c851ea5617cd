"""The embedded subject, an inverted seven in five images, and a measure of how well it is learnt."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from randlora_vision.demos.pipelines import PIXELS, PROMPTS
from randlora_vision.training.data.sources import digits
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.results import Shares
from randlora_vision.training.dreambooth.samples import Sampler
from randlora_vision.training.dreambooth.subject import Subject

DIGIT = 7
_IMAGES = 5
_SAMPLES, _SAMPLES_PER_DIGIT = 32, 4


def demo_subject(options: SubjectOptions) -> Subject:
    """Return five training images of an inverted seven."""
    assert options.instance_prompt is not None
    pictures = digits.read_digits((DIGIT,), inverted=True).images["train"][:_IMAGES]
    return Subject("inverted sevens", [_small(picture) for picture in pictures], [options.instance_prompt] * _IMAGES)


def measure(sampler: Sampler, subject_prompt: str, class_prompt: str, seed: int) -> Shares:
    """Classify samples of a pipeline by logistic regression, fitted to real upright and inverted digits.

    The seeds of the samples differ from those of the pictures in the run folder.
    """
    own = [prompt for prompt in PROMPTS for _ in range(_SAMPLES_PER_DIGIT)]
    prompts = [subject_prompt] * _SAMPLES + [class_prompt] * _SAMPLES + own
    pictures = sampler.draw(sampler.encode(prompts), [10_000 + seed + number for number in range(len(prompts))])
    answers = _judge().predict(_features(pictures))
    ten = len(digits.NAMES)
    of_subject, of_class, of_digits = np.split(answers, [_SAMPLES, 2 * _SAMPLES])
    return Shares(
        subject=float((of_subject == ten + DIGIT).mean()),
        class_kept=float((of_class < ten).mean()),
        digits_kept=float((of_digits == np.repeat(np.arange(ten), _SAMPLES_PER_DIGIT)).mean()),
    )


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
