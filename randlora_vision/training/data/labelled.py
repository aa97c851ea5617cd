"""Images with classes as training batches."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from randlora_vision.training.data.batches import Pictures
from randlora_vision.training.data.decode import WHITE, Colour
from randlora_vision.training.data.part import Stream
from randlora_vision.training.data.pictures import Picture, Transform, held_out_files
from randlora_vision.training.data.skipped import SkipList

NOT_MEASURED = -1
"""The label of an image that stands in for a batch of unreadable images; it does not count."""


class Batch(TypedDict):
    """Images (B, 3, H, W) float32 and their labels (B,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSplits:
    """Images (files, items of a dataset, or already decoded) and labels of each split, and the origin of the splits.

    `val` is evaluated during training and selects the best state. `test`, if there is one, is evaluated before and
    after training; otherwise `val` is, and its figures are called those of the validation images. Images for
    evaluation alone are a single split: `train`, `val`, `test` or `all`.
    """

    name: str
    class_names: Sequence[str]
    images: Mapping[str, Sequence[Picture]]
    labels: Mapping[str, Sequence[int]]
    origin: str
    augment: Callable[[Image.Image], Image.Image] | None = None  # in place of the model's own augmentation
    chosen: Sequence[int] | None = None  # where `train` is a part: its positions in the whole training split
    notes: Sequence[str] = ()  # for the user, one line each
    background: Colour = WHITE  # of transparent pixels
    stream: Stream | None = None  # in place of `train`, which is then empty

    @property
    def final(self) -> str:
        """The split that is evaluated before and after training."""
        return final_split(self.images)

    def select(self, split: str, transform: Transform, skipped: SkipList) -> "LabelledImages":
        """Return one split as a dataset."""
        stream = self.stream if split == "train" else None
        return LabelledImages(self.images[split], self.labels[split], transform, skipped, self.background, stream)

    def __str__(self) -> str:
        return f"{self.name}: {sizes_of(self.images, self.stream)}, {len(self.class_names)} classes ({self.origin})"

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: the sizes, the origin, and the files that were held out."""
        return {
            "name": self.name,
            "origin": self.origin,
            "class_names": list(self.class_names),
            "sizes": {name: len(images) for name, images in self.images.items()},
            "held_out": held_out_files(self.images),
            **({"chosen": list(self.chosen)} if self.chosen is not None else {}),
            **({"streamed": list(self.stream.shards)} if self.stream is not None else {}),
        }


def sizes_of(images: Mapping[str, Sequence[Picture]], stream: Stream | None) -> str:
    """Return the sizes of the splits in words."""
    streamed = [f"{len(stream.shards)} shards streamed for train"] if stream else []
    return ", ".join([*streamed, *(f"{len(images[name])} {name}" for name in images if images[name] or not stream)])


def final_split(splits: Mapping[str, Any]) -> str:
    """Return the split that is evaluated before and after training: `test`, else `val`, else the only one."""
    return next((split for split in ("test", "val") if split in splits), next(iter(splits)))


class LabelledImages(Pictures):
    """Pictures with one label each."""

    def __init__(
        self,
        images: Sequence[Picture],
        labels: Sequence[int],
        transform: Transform,
        skipped: SkipList,
        background: Colour = WHITE,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(images, transform, skipped, background, stream)
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
