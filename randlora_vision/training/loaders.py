"""How many processes load, and the same loader over other batches."""

import os
from typing import Any

from torch.utils.data import DataLoader, Dataset

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


def with_batches(loader: "DataLoader[Any]", dataset: Dataset, batch_sampler: Any) -> "DataLoader[Any]":
    """Return a loader as `loader` in all but its data and what of them makes a batch."""
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
