"""Datasets of pictures, the order of their batches, and the worker processes that load them."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from randlora_vision.training.data.decode import WHITE, Colour
from randlora_vision.training.data.part import Stream
from randlora_vision.training.data.pictures import Picture, Transform, readable
from randlora_vision.training.data.skipped import SkipList

_MOST_WORKERS = 4


def worker_count(workers: int | None, decoding: bool) -> int:
    """Return the number of loader processes: `workers` if given, else 0 when there is nothing to decode.

    Otherwise it is this process's share of the cores, less one for the process itself, and at most 4.
    """
    if workers is not None:
        return workers
    if not decoding:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(_MOST_WORKERS, cores // processes - 1))


class _Items(Protocol):
    """Items, some of which cannot be read and are None."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Filled(Dataset):
    """Items as (item, own): the next readable in place of an unreadable one; raises ValueError if there is none."""

    def __init__(self, data: _Items) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        """Return an item, and whether it is that of `index`."""
        for place in itertools.chain(range(index, len(self)), range(index)):
            item = self.data[place]
            if item is not None:
                return item, place == index
        raise ValueError(f"none of {len(self)} images can be read: see skipped.txt in the run folder")


class ShuffledBatches(Sampler[list[int]]):
    """A fixed number of batches of indices, each item once per pass, in an order set by the seed alone.

    Passes follow each other without a break: one batch may end a pass and begin the next. Every batch
    therefore has `batch_size` items whatever the size of the data, and batch k does not depend on where
    reading starts. With `repeats`, each item comes that often in a row, and a pass, which is not longer, has as many
    fewer of them, as in timm.
    """

    def __init__(self, items: int, batch_size: int, batches: int, seed: int, repeats: int = 1) -> None:
        assert items > 0
        self.items = items
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.repeats = repeats
        self.drop_last = False  # accelerate reads this attribute

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for _ in range(self.batches):
            while len(waiting) < self.batch_size:
                order = torch.randperm(self.items, generator=generator)
                waiting += order.repeat_interleave(self.repeats)[: self.items].tolist()
            yield waiting[: self.batch_size]
            del waiting[: self.batch_size]


class Pictures(Dataset[Any]):
    """Pictures (files, items of a dataset, or already decoded) that are transformed on access.

    An unreadable file is recorded in `skipped` and gives None. Training batches take the next readable picture in its
    place; evaluation leaves it out.
    """

    background: Colour = WHITE
    """The colour of transparent pixels."""
    stream: Stream | None = None
    """Where `read` gets its pictures from if there are no `images`."""

    def __init__(self, images: Sequence[Picture], transform: Transform, skipped: SkipList) -> None:
        self.images = images
        self.transform = transform
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image | None:
        """Return the picture itself, before any transform, or None when it cannot be read."""
        return self.decode(self.images[index])

    def decode(self, image: Picture) -> Image.Image | None:
        """Return a picture before any transform, or None when it cannot be read."""
        return readable(image, self.skipped, self.background)

    def read(self, image: Picture, *words: Any) -> Any:
        """Return an item for a picture and its labels or captions, or None when it cannot be read."""
        raise NotImplementedError

    @staticmethod
    def collate(items: Sequence[Any], measured: bool = True) -> Any:
        """Stack items that were read; unless `measured`, mark the batch as one that does not count."""
        raise NotImplementedError


def spaced_batch(data: Pictures, most: int) -> Any:
    """Return a batch of up to `most` pictures, evenly spaced, as files are often sorted by class."""
    number = min(most, len(data))
    readable_items = Filled(data)
    return data.collate([readable_items[place * len(data) // number][0] for place in range(number)])


def training_batches(
    data: Pictures, batch_size: int, batches: int, seed: int, workers: int | None, repeats: int = 1
) -> "DataLoader[Any]":
    """Return a loader of exactly `batches` shuffled batches, all of `batch_size` pictures."""
    order = ShuffledBatches(len(data), batch_size, batches, seed, repeats)
    collate = partial(_filled_batch, data.collate)
    return DataLoader(Filled(data), batch_sampler=order, collate_fn=collate, **_loading(data, workers))


def evaluation_batches(data: Pictures, batch_size: int, workers: int | None) -> "DataLoader[Any]":
    """Return a loader that reads `data` once, in order.

    A batch of which nothing can be read still runs through the model, which several processes may have to call equally
    often: it holds the next readable picture, marked as one that does not count.
    """
    collate = partial(_measured_batch, data.collate)
    return DataLoader(Filled(data), batch_size=batch_size, collate_fn=collate, **_loading(data, workers))


def _filled_batch(collate: Callable[..., Any], items: Sequence[tuple[Any, bool]]) -> Any:
    return collate([item for item, _ in items])


def _measured_batch(collate: Callable[..., Any], items: Sequence[tuple[Any, bool]]) -> Any:
    own = [item for item, is_own in items if is_own]
    return collate(own) if own else collate([items[0][0]], measured=False)


def _loading(data: Pictures, workers: int | None) -> dict[str, Any]:
    decoding = not all(isinstance(image, Image.Image) for image in data.images[:1])
    return {"num_workers": worker_count(workers, decoding), "pin_memory": torch.cuda.is_available()}
