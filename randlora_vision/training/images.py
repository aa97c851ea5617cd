"""Labelled images as training batches: decoding, what to do with unreadable files, and the order."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from randlora_vision.training.loaders import worker_count

Transform = Callable[[Image.Image], Tensor]
_Item = TypeVar("_Item")


class Batch(TypedDict):
    """Images (B, 3, H, W) float32 and their labels (B,) int64."""

    images: Tensor
    labels: Tensor


class SkipList:
    """What of the data could not be used: one line each in a text file, or an error when strict.

    Loader processes append to the same file, so what they meet is known after the run too.
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.path = path
        self.strict = strict
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, image: "Picture | str", reason: object) -> None:
        """Note an unreadable image, or (a string) a place in a file; raise ValueError when strict."""
        if self.strict:
            what = "cannot use" if isinstance(image, str) else "cannot read the image"
            raise ValueError(f"{what} {image}: {reason} (without --strict-data it is skipped)")
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

    def __str__(self) -> str:
        count = self.count()
        return f"; skipped {count} that cannot be used, listed in {self.path}" if count else ""


def read_image(source: Path | IO[bytes]) -> Image.Image:
    """Decode an image as RGB; raise OSError when it cannot be."""
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise OSError("it is in no image format that Pillow knows") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises these, beside OSError, on broken files.
        raise OSError(f"{type(error).__name__}: {error}") from error


class Readable(Protocol):
    """An image that is neither a file nor decoded yet. Its string says which one it is."""

    def read(self) -> Image.Image:
        """Decode it as RGB; raise OSError when it cannot be."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a dataset that is asked for its items one by one, each a tuple or dictionary with the image.

    That is decoded, or a file that is open.
    """

    dataset: Any
    index: int
    key: int | str = 0

    def read(self) -> Image.Image:
        """Decode it as RGB; raise OSError when it cannot be."""
        try:
            image: Image.Image | IO[bytes] = self.dataset[self.index][self.key]
            return image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
        except Exception as error:  # of whatever library keeps it
            raise OSError(f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return f"image {self.index} of {type(self.dataset).__name__}"


Picture = Path | Image.Image | Readable


def open_picture(image: Picture) -> Image.Image:
    """Return an image, decoded where it is not; raise OSError when it cannot be."""
    if isinstance(image, Image.Image):
        return image
    return read_image(image) if isinstance(image, Path) else image.read()


def readable(image: Picture, skipped: SkipList) -> Image.Image | None:
    """Return an image, or note in `skipped` that it cannot be decoded and return None."""
    try:
        return open_picture(image)
    except OSError as error:
        skipped.add(image, error)
        return None


def held_out_files(images: Mapping[str, Sequence[Picture]]) -> dict[str, list[str]]:
    """Return which images are not for training, by split; those of the embedded data have no names."""
    held_out = {name: images for name, images in images.items() if name != "train"}
    return {
        name: [str(image) for image in images if not isinstance(image, Image.Image)]
        for name, images in held_out.items()
    }


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
        return {
            "name": self.name,
            "origin": self.origin,
            "class_names": list(self.class_names),
            "sizes": {name: len(images) for name, images in self.images.items()},
            "held_out": held_out_files(self.images),
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
        return readable(self.images[index], self.skipped)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        picture = self.picture(index)
        return None if picture is None else (self.transform(picture), self.labels[index])


def sample_pictures(data: LabelledImages, most: int) -> tuple[list[Image.Image], list[int]]:
    """Return up to `most` readable pictures, always the same ones, and their labels."""
    order = random.Random(0).sample(range(len(data)), len(data))
    pictures = ((data.picture(index), data.labels[index]) for index in order)
    chosen = list(itertools.islice(((picture, label) for picture, label in pictures if picture is not None), most))
    return [picture for picture, _ in chosen], [label for _, label in chosen]


def collate(items: Sequence[tuple[Tensor, int] | None]) -> Batch:
    """Stack the readable items of a batch."""
    images, labels = zip(*readable_items(items), strict=True)
    return Batch(images=torch.stack(images), labels=torch.tensor(labels))


def readable_items(items: Sequence[_Item | None]) -> list[_Item]:
    """Return the items of a batch that could be read; raise ValueError when none could."""
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError("not one image of a batch could be read: see skipped.txt in the run folder")
    return found


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
    data: LabelledImages, batch_size: int, batches: int, seed: int, workers: int | None
) -> "DataLoader[Batch]":
    """Return a loader of exactly `batches` shuffled batches."""
    order = ShuffledBatches(len(data), batch_size, batches, seed)
    return DataLoader(data, batch_sampler=order, collate_fn=collate, **loading(data.images, workers))


def evaluation_batches(data: LabelledImages, batch_size: int, workers: int | None) -> "DataLoader[Batch]":
    """Return a loader that reads `data` once, in order."""
    return DataLoader(data, batch_size=batch_size, collate_fn=collate, **loading(data.images, workers))


def loading(images: Sequence[Picture], workers: int | None) -> dict[str, Any]:
    """Return how a loader of images works ahead: processes that decode, and memory that a GPU copies from at once."""
    decoding = not all(isinstance(image, Image.Image) for image in images[:1])
    return {"num_workers": worker_count(workers, decoding), "pin_memory": torch.cuda.is_available()}
