"""The embedded data: scikit-learn's real handwritten digits, which need no download.

They give two tasks: the upright digits 0-4, on which the demo model is pretrained, and all ten digits with
background and foreground swapped, to which it is adapted.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomRotation

from randlora_vision.training.data.labelled import ImageSplits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN_DIGITS = (0, 1, 2, 3, 4)
"""The digits on which the demo models are pretrained."""
TEMPLATES = (
    "a photo of the digit {}.",
    "a handwritten {}.",
    "the number {}.",
    "a scan of a {}.",
    "a small picture of the number {}.",
)
IMAGE_SIZE = 32
_ROTATION = 15.0  # degrees, in either direction


@cache
def _split_indices() -> dict[str, np.ndarray]:
    """Return the fixed, stratified split: 1000 images, 198 (which the default rates were chosen on) and 599."""
    from sklearn.model_selection import train_test_split

    labels = _load()[1]
    rest, test = train_test_split(np.arange(len(labels)), test_size=599, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=198, stratify=labels[rest], random_state=0)
    return {"train": train, "val": val, "test": test}


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return the images (1797, 8, 8) as bytes and the labels (1797,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def read_digits(classes: Sequence[int] = range(10), inverted: bool = False) -> ImageSplits:
    """Return the digits in `classes` as RGB pictures, IMAGE_SIZE pixels square; labels index `classes`.

    `inverted` swaps background and foreground. Training images are rotated slightly at random.
    """
    labels = _load()[1]
    chosen = {
        split: [index for index in indices if labels[index] in classes] for split, indices in _split_indices().items()
    }
    background = 255 if inverted else 0
    return ImageSplits(
        name=f"{'inverted' if inverted else 'upright'} digits {min(classes)}-{max(classes)}",
        class_names=[NAMES[digit] for digit in classes],
        images={split: [_picture(int(i), inverted) for i in indices] for split, indices in chosen.items()},
        labels={split: [classes.index(labels[i]) for i in indices] for split, indices in chosen.items()},
        origin="scikit-learn's digits, stratified, seed 0",
        augment=RandomRotation(_ROTATION, interpolation=InterpolationMode.BILINEAR, fill=background),
    )


@cache
def _picture(index: int, inverted: bool) -> Image.Image:
    pixels = _load()[0][index]
    image = Image.fromarray(255 - pixels if inverted else pixels)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR).convert("RGB")
