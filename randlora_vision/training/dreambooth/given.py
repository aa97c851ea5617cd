"""What inpainting and editing are given beside the text: masks, drawn or the user's, and images to edit."""

import random
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from randlora_vision.training.dreambooth.buckets import Size, fit, fit_like
from randlora_vision.training.dreambooth.families import Takes

_ALIKE = 0.02  # how far the proportions of a mask may be from those of its image: rounding of a smaller mask


def alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes have the same proportions."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= _ALIKE


def as_given(images: Sequence[Image.Image], sizes: Tensor, takes: Takes) -> Tensor:
    """Return a mask (1, h, w), 1 where it is white, an image to edit (3, h, w), between -1 and 1, or N (N, 3, h, w).

    It is cropped as `fit` cropped the image that it belongs to, which returned `sizes`; one of several that has other
    proportions is cropped at the center.
    """
    if takes == "mask":
        return (fit_like(images[0].convert("L"), sizes) >= 0.5).float()
    if takes == "image":
        return fit_like(images[0], sizes) * 2 - 1
    high, wide, _, _, height, width = sizes.tolist()
    return torch.stack(
        [
            fit_like(image, sizes) * 2 - 1
            if alike(image.size, (wide, high))
            else fit(image, (height, width), center_crop=True)[0]
            for image in images
        ]
    )


def random_mask(size: Size) -> Tensor:
    """Return a mask (1, h, w) from Python's `random`: one in four is whole, others are a rectangle or an ellipse."""
    mask = Image.new("L", size[::-1], 255)
    if random.random() >= 0.25:
        sides = [random.randint(max(1, side // 4), side) for side in size]
        top, left = (random.randint(0, side - covered) for side, covered in zip(size, sides, strict=True))
        mask.paste(0, (0, 0, *mask.size))
        pen = ImageDraw.Draw(mask)
        draw = pen.rectangle if random.random() < 0.5 else pen.ellipse
        draw((left, top, left + sides[1] - 1, top + sides[0] - 1), fill=255)
    return pil_to_tensor(mask).float() / 255


def middle_mask(size: Size) -> Tensor:
    """Return a mask (1, h, w) of the middle half of both sides."""
    height, width = size
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask
