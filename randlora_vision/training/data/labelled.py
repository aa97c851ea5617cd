"""Images with classes as training batches."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from randlora_vision.training.data.batches import Filled, ShuffledBatches, loading, measured_items
from randlora_vision.training.data.decode import WHITE, Colour
from randlora_vision.training.data.pictures import Picture, Transform, held_out_files, readable
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

    @property
    def final(self) -> str:
        """The split that is evaluated before and after training."""
        return final_split(self.images)

    def select(self, split: str, transform: Transform, skipped: SkipList) -> "LabelledImages":
        """Return one split as a dataset."""
        return LabelledImages(self.images[split], self.labels[split], transform, skipped, self.background)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(images)} {name}" for name, images in self.images.items())
        return f"{self.name}: {sizes}, {len(self.class_names)} classes ({self.origin})"

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: the sizes, the origin, and the files that were held out."""
        return {
            "name": self.name,
            "origin": self.origin,
            "class_names": list(self.class_names),
            "sizes": {name: len(images) for name, images in self.images.items()},
            "held_out": held_out_files(self.images),
            **({"chosen": list(self.chosen)} if self.chosen is not None else {}),
        }


def final_split(splits: Mapping[str, Any]) -> str:
    """Return the split that is evaluated before and after training: `test`, else `val`, else the only one."""
    return next((split for split in ("test", "val") if split in splits), next(iter(splits)))


class LabelledImages(Dataset):
    """Images (files, items of a dataset, or already decoded) with one label each, transformed on access.

    An unreadable file is recorded in `skipped` and gives None. Training batches take the next readable image in its
    place; evaluation leaves it out. Transparent pixels get the colour `background`.
    """

    def __init__(
        self,
        images: Sequence[Picture],
        labels: Sequence[int],
        transform: Transform,
        skipped: SkipList,
        background: Colour = WHITE,
    ) -> None:
        assert len(images) == len(labels)
        self.images = list(images)
        self.labels = list(labels)
        self.transform = transform
        self.skipped = skipped
        self.background = background

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image | None:
        """Return the image itself, before any transform, or None when it cannot be read."""
        return readable(self.images[index], self.skipped, self.background)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        picture = self.picture(index)
        return None if picture is None else (self.transform(picture), self.labels[index])


def sample_pictures(data: LabelledImages, most: int) -> tuple[list[Image.Image], list[int]]:
    """Return up to `most` readable pictures, always the same ones, and their labels."""
    order = random.Random(0).sample(range(len(data)), len(data))
    pictures = ((data.picture(index), data.labels[index]) for index in order)
    chosen = list(itertools.islice(((picture, label) for picture, label in pictures if picture is not None), most))
    return [picture for picture, _ in chosen], [label for _, label in chosen]


def collate(items: Sequence[tuple[tuple[Tensor, int], bool]]) -> Batch:
    """Stack the items of a training batch."""
    images, labels = zip(*(item for item, _ in items), strict=True)
    return Batch(images=torch.stack(images), labels=torch.tensor(labels))


def collate_measured(items: Sequence[tuple[tuple[Tensor, int], bool]]) -> Batch:
    """Stack the readable items of an evaluation batch; the label is `NOT_MEASURED` if there are none."""
    chosen, measured = measured_items(items)
    images, labels = zip(*chosen, strict=True)
    return Batch(images=torch.stack(images), labels=torch.tensor(labels if measured else [NOT_MEASURED]))


def training_batches(
    data: LabelledImages, batch_size: int, batches: int, seed: int, workers: int | None
) -> "DataLoader[Batch]":
    """Return a loader of exactly `batches` shuffled batches."""
    order = ShuffledBatches(len(data), batch_size, batches, seed)
    return DataLoader(Filled(data), batch_sampler=order, collate_fn=collate, **loading(data.images, workers))


def evaluation_batches(data: LabelledImages, batch_size: int, workers: int | None) -> "DataLoader[Batch]":
    """Return a loader that reads `data` once, in order."""
    return DataLoader(Filled(data), batch_size=batch_size, collate_fn=collate_measured, **loading(data.images, workers))
