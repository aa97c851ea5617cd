"""The order of batches, and the processes that load them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import Sampler

from randlora_vision.training.data.pictures import Picture

_MOST_WORKERS = 4


def worker_count(workers: int | None, decoding: bool) -> int:
    """Return the number of loader processes: as told, else none where there is nothing to decode.

    Otherwise it is what a process has of the cores, one of them left to it, and at most 4.
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


def loading(images: Sequence[Picture], workers: int | None) -> dict[str, Any]:
    """Return how a loader of images works ahead: processes that decode, and memory that a GPU copies from at once."""
    decoding = not all(isinstance(image, Image.Image) for image in images[:1])
    return {"num_workers": worker_count(workers, decoding), "pin_memory": torch.cuda.is_available()}
