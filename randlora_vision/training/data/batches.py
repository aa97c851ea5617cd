"""Datasets of pictures, the order of their batches, and the worker processes that load them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from randlora_vision.training.data.pictures import Picture, SkipList, Transform, readable

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


_Item = TypeVar("_Item")


def readable_items(items: Sequence[_Item | None]) -> list[_Item]:
    """Return the items of a batch that could be read; raise ValueError when there are none."""
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError("no image of a batch could be read: see skipped.txt in the run folder")
    return found


class ShuffledBatches(Sampler[list[int]]):
    """A fixed number of batches of indices, each item once per pass, in an order set by the seed alone.

    Passes follow each other without a break: one batch may end a pass and begin the next. Every batch
    therefore has `batch_size` items whatever the size of the data, and batch k does not depend on where
    reading starts.
    """

    def __init__(self, items: int, batch_size: int, batches: int, seed: int) -> None:
        assert items > 0
        self.items = items
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.drop_last = False  # accelerate reads this attribute

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


class Pictures(Dataset[Any]):
    """Pictures (files, items of a dataset, or already decoded) that are transformed on access.

    An unreadable file is recorded in `skipped` and gives None, which `collate` leaves out.
    """

    def __init__(self, images: Sequence[Picture], transform: Transform, skipped: SkipList) -> None:
        self.images = images
        self.transform = transform
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image | None:
        """Return the picture itself, before any transform, or None when it cannot be read."""
        return readable(self.images[index], self.skipped)

    @staticmethod
    def collate(items: Sequence[Any]) -> Any:
        """Stack the readable items of a batch."""
        raise NotImplementedError


def training_batches(
    data: Pictures, batch_size: int, batches: int, seed: int, workers: int | None
) -> "DataLoader[Any]":
    """Return a loader of exactly `batches` shuffled batches."""
    order = ShuffledBatches(len(data), batch_size, batches, seed)
    return DataLoader(data, batch_sampler=order, collate_fn=data.collate, **_loading(data, workers))


def evaluation_batches(data: Pictures, batch_size: int, workers: int | None) -> "DataLoader[Any]":
    """Return a loader that reads `data` once, in order."""
    return DataLoader(data, batch_size=batch_size, collate_fn=data.collate, **_loading(data, workers))


def _loading(data: Pictures, workers: int | None) -> dict[str, Any]:
    decoding = not all(isinstance(image, Image.Image) for image in data.images[:1])
    return {"num_workers": worker_count(workers, decoding), "pin_memory": torch.cuda.is_available()}
