"""Images with classes as training batches."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from PIL import Image
from torch import Tensor

from randlora_vision.training.data.batches import Pictures
from randlora_vision.training.data.pictures import Picture, Transform
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.split_images import SplitImages

NOT_MEASURED = -1
"""The label of an image that stands in for a batch of unreadable images; it does not count."""


class Batch(TypedDict):
    """Images (B, C, H, W) float32, or N copies of each (B, N, C, H, W), and their labels (B,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageSplits(SplitImages):
    """Images with classes: the labels of every split are positions in `class_names`."""

    tables: ClassVar = ("images", "labels")
    class_names: Sequence[str]
    labels: Mapping[str, Sequence[int]]

    def select(self, split: str, transform: Transform, skipped: SkipList) -> "LabelledImages":
        """Return one split as a dataset."""
        return self.reading(LabelledImages(self.images[split], self.labels[split], transform, skipped), split)

    def __str__(self) -> str:
        return f"{self.name}: {self.sizes}, {len(self.class_names)} classes ({self.origin})"

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps, with the class names."""
        return {**super().record(), "class_names": list(self.class_names)}


class LabelledImages(Pictures):
    """Pictures with one label each."""

    def __init__(
        self, images: Sequence[Picture], labels: Sequence[int], transform: Transform, skipped: SkipList
    ) -> None:
        super().__init__(images, transform, skipped)
        assert len(images) == len(labels)
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        return self.read(self.images[index], self.labels[index])

    def read(self, image: Picture, label: int) -> tuple[Tensor, int] | None:
        """Return image (3, H, W) and label."""
        picture = self.decode(image)
        return None if picture is None else (self.transform(picture), label)

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, int]], measured: bool = True) -> Batch:
        """Stack items; unless `measured`, the labels are `NOT_MEASURED`."""
        images, labels = zip(*items, strict=True)
        numbers = torch.tensor(labels) if measured else torch.full((len(items),), NOT_MEASURED)
        return Batch(images=torch.stack(images), labels=numbers)


def sample_pictures(data: LabelledImages, most: int) -> tuple[list[Image.Image], list[int]]:
    """Return up to `most` readable pictures, always the same ones, and their labels."""
    order = random.Random(0).sample(range(len(data)), len(data))
    pictures = ((data.picture(index), data.labels[index]) for index in order)
    chosen = list(itertools.islice(((picture, label) for picture, label in pictures if picture is not None), most))
    return [picture for picture, _ in chosen], [label for _, label in chosen]
