"""Labelled images as training batches: decoding, what to do with unreadable files, and the order."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Transform = Callable[[Image.Image], Tensor]


class Batch(TypedDict):
    """Images (B, 3, H, W) float32 and their labels (B,) int64."""

    images: Tensor
    labels: Tensor


class SkipList:
    """The image files that could not be read: one line each in a text file, or an error when strict.

    Loader processes append to the same file, so what they meet is known after the run too.
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.path = path
        self.strict = strict
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, image: "Path | StoredImage", reason: object) -> None:
        """Note an unreadable image; raise ValueError when strict."""
        if self.strict:
            raise ValueError(f"cannot read the image {image}: {reason} (without --strict-data it is skipped)")
        with self._lock:
            if self.path is None or str(image) in self._seen:
                return
            self._seen.add(str(image))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{image}\t{reason}\n")

    def count(self) -> int:
        """Return how many different images were noted, by any process."""
        if self.path is None or not self.path.exists():
            return 0
        return len({line.split("\t")[0] for line in self.path.read_text(encoding="utf-8").splitlines()})


def read_image(path: Path) -> Image.Image:
    """Decode an image file as RGB; raise OSError when it cannot be."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises these, beside OSError, on broken files.
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class StoredImage:
    """An image of a dataset that is asked for its items one by one, each an image and a label."""

    dataset: Any
    index: int

    def read(self) -> Image.Image:
        """Decode it as RGB; raise OSError when it cannot be."""
        try:
            image: Image.Image = self.dataset[self.index][0]
            return image.convert("RGB")
        except Exception as error:  # of whatever library keeps it
            raise OSError(f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return f"image {self.index} of {type(self.dataset).__name__}"


Picture = Path | Image.Image | StoredImage


@dataclass(frozen=True)
class ImageSplits:
    """Images (files, items of a dataset, or already decoded) and labels of each split, and where the splits came from.

    `val` chooses and is looked at during training; `test` is for the numbers before and after. Where
    the data has only one of the two, both are the same images.
    """

    name: str
    class_names: Sequence[str]
    images: Mapping[str, Sequence[Picture]]
    labels: Mapping[str, Sequence[int]]
    origin: str
    augment: Callable[[Image.Image], Image.Image] | None = None  # in place of the model's own augmentation
    chosen: Sequence[int] | None = None  # where `train` is a part: its positions in the whole training split

    def select(self, split: str, transform: Transform, skipped: "SkipList") -> "LabelledImages":
        """Return one split as a dataset."""
        return LabelledImages(self.images[split], self.labels[split], transform, skipped)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(images)} {name}" for name, images in self.images.items())
        return f"{self.name}: {sizes}, {len(self.class_names)} classes ({self.origin})"

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: the sizes, the origin, and the files that were held out."""
        held_out = {name: images for name, images in self.images.items() if name != "train"}
        return {
            "name": self.name,
            "origin": self.origin,
            "class_names": list(self.class_names),
            "sizes": {name: len(images) for name, images in self.images.items()},
            "held_out": {
                name: [str(image) for image in images if isinstance(image, Path)] for name, images in held_out.items()
            },
            **({"chosen": list(self.chosen)} if self.chosen is not None else {}),
        }


class LabelledImages(Dataset):
    """Images (files, items of a dataset, or already decoded) with a label each, transformed when asked for.

    An unreadable file goes to `skipped` and gives None, which `collate` leaves out.
    """

    def __init__(
        self,
        images: Sequence[Picture],
        labels: Sequence[int],
        transform: Transform,
        skipped: SkipList,
    ) -> None:
        assert len(images) == len(labels)
        self.images = list(images)
        self.labels = list(labels)
        self.transform = transform
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image | None:
        """Return the image itself, before any transform, or None when it cannot be read."""
        image = self.images[index]
        if isinstance(image, Image.Image):
            return image
        try:
            return image.read() if isinstance(image, StoredImage) else read_image(image)
        except OSError as error:
            self.skipped.add(image, error)
            return None

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        picture = self.picture(index)
        return None if picture is None else (self.transform(picture), self.labels[index])


def sample_pictures(data: LabelledImages, most: int) -> tuple[list[Image.Image], list[int]]:
    """Return up to `most` readable pictures, always the same ones, and their labels."""
    order = random.Random(0).sample(range(len(data)), len(data))
    readable = ((data.picture(index), data.labels[index]) for index in order)
    chosen = list(itertools.islice(((picture, label) for picture, label in readable if picture is not None), most))
    return [picture for picture, _ in chosen], [label for _, label in chosen]


def collate(items: Sequence[tuple[Tensor, int] | None]) -> Batch:
    """Stack the readable items of a batch."""
    readable = [item for item in items if item is not None]
    if not readable:
        raise ValueError("not one image of a batch could be read: see skipped.txt in the run folder")
    return Batch(
        images=torch.stack([image for image, _ in readable]),
        labels=torch.tensor([label for _, label in readable]),
    )


class ShuffledBatches(Sampler[list[int]]):
    """A fixed number of batches of indices, each item once per pass, in an order that only the seed decides.

    Passes follow each other without a break: a batch may end one and begin the next, so every batch
    has `batch_size` items whatever the size of the data, and batch k does not depend on where one
    starts reading.
    """

    def __init__(self, items: int, batch_size: int, batches: int, seed: int) -> None:
        assert items > 0
        self.items = items
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.drop_last = False  # accelerate asks every batch sampler for it

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for _ in range(self.batches):
            while len(waiting) < self.batch_size:
                waiting += torch.randperm(self.items, generator=generator).tolist()
            yield waiting[: self.batch_size]
            del waiting[: self.batch_size]


def training_batches(
    data: LabelledImages, batch_size: int, batches: int, seed: int, workers: int
) -> "DataLoader[Batch]":
    """Return a loader of exactly `batches` shuffled batches."""
    return DataLoader(
        data,
        batch_sampler=ShuffledBatches(len(data), batch_size, batches, seed),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_batches(data: LabelledImages, batch_size: int, workers: int) -> "DataLoader[Batch]":
    """Return a loader that reads `data` once, in order."""
    return DataLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers)
