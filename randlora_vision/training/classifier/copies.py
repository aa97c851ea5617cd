"""Images together with augmented copies of them."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from randlora_vision.training.data.pictures import Transform


class Copies:
    """A transform to the image and augmented copies of it, (N, C, H, W).

    Args:
        crop: Applied once, before the other transforms.
        change: Makes a copy; applied N - 1 times.
        last: Makes a tensor of a copy.
        first: Makes a tensor of the image.
        count: N.
    """

    def __init__(
        self,
        crop: Callable[[Image.Image], Image.Image],
        change: Callable[[Image.Image], Image.Image],
        last: Transform,
        first: Transform,
        count: int,
    ) -> None:
        self.crop = crop
        self.change = change
        self.last = last
        self.first = first
        self.count = count

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return the image, then the copies."""
        cropped = self.crop(picture)
        copies = (self.last(self.change(cropped)) for _ in range(self.count - 1))
        return torch.stack([self.first(cropped), *copies])
