"""The order of batches, and the worker processes that load them."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from randlora_vision.training.data.pictures import Picture

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
    """The items of a dataset as (item, place): the item itself, or in place of an unreadable one the next readable.

    Raises ValueError when no item can be read.
    """

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


def measured_items(items: Sequence[tuple[Any, bool]]) -> tuple[list[Any], bool]:
    """Return the items of an evaluation batch that could be read themselves, and True.

    If there are none, return a single item in their place and False. Such a batch still runs through the model, which
    several processes may have to call equally often, but its results do not count.
    """
    own = [item for item, is_own in items if is_own]
    return (own, True) if own else ([items[0][0]], False)


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


def loading(images: Sequence[Picture], workers: int | None) -> dict[str, Any]:
    """Return the DataLoader arguments for loading images: worker processes and pinned memory."""
    decoding = not all(isinstance(image, Image.Image) for image in images[:1])
    return {"num_workers": worker_count(workers, decoding), "pin_memory": torch.cuda.is_available()}
