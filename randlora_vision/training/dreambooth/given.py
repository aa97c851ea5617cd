"""What inpainting and editing are given beside the text: masks, drawn or the user's, and images to edit."""

import random

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from randlora_vision.training.dreambooth.buckets import Size, fit_like
from randlora_vision.training.dreambooth.families import Takes


def as_given(image: Image.Image, sizes: Tensor, takes: Takes) -> Tensor:
    """Return a mask (1, h, w), 1 where it is white, or an image to edit (3, h, w), between -1 and 1.

    It is cropped as `fit` cropped the image that it belongs to, which returned `sizes`.
    """
    if takes == "mask":
        return (fit_like(image.convert("L"), sizes) >= 0.5).float()
    return fit_like(image, sizes) * 2 - 1


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
