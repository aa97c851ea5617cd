"""Random numbers that depend only on the seed and the position in the run, so that a run can resume anywhere.

By hand, because accelerate restores the generators of a process, but not those of its loader's worker processes.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

_L = TypeVar("_L")


def seed_everything(*key: int | str) -> None:
    """Seed Python, NumPy and PyTorch (every device) with a hash of `key`; similar keys give unrelated numbers."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # for a GPU that is not there, manual_seed queues a call with its stack: time, and memory that is never freed
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def seeded_items(loader: _L, seed: int) -> "_L | DataLoader[Any]":
    """Return a loader of the same batches in which augmentation depends only on (seed, position) of an item.

    The position counts items from the start of training, so loader processes, prefetching and resuming do
    not change a picture. Anything but a loader with a batch sampler has no positions and is returned as it is:
    it must use random generators of its own.
    """
    _has_accelerator()  # a process forked from one that uses CUDA could not tell
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return loader
    return with_batches(loader, _SeededItems(loader.dataset, seed), _Numbered(loader.batch_sampler))


class _Numbered(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) instead of batches of indices."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.batch_size = batches.batch_size  # accelerate reads these two
        self.drop_last = batches.drop_last

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = 0
        for batch in self.batches:
            yield list(enumerate(batch, start=position))
            position += len(batch)


class _SeededItems(Dataset):
    """The items of a dataset, indexed by (position, index)."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        position, index = place
        seed_everything("item", self.seed, position)
        return self.data[index]


def with_batches(loader: "DataLoader[Any]", dataset: Dataset, batch_sampler: Any) -> "DataLoader[Any]":
    """Return a copy of `loader` with another dataset and batch sampler."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
