"""Training batches: common ones that accelerate distributes, or a process's own from shards that are read in order.

Every worker of every process is a lane. In every epoch, the shards are put in an order that depends on the seed and the
epoch alone. Each lane takes every L-th of them, shuffles their samples in a buffer, and gives as many batches as the
others; if its shards have too few samples, it starts over. The batches of a lane in an epoch depend on nothing before
it, so a resumed run reads only the epoch in which it was stopped again, without decoding the images that were used.

Shapes: P processes, W workers each, L = P * W lanes, B images in a batch.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from randlora_vision.names import counted, listing
from randlora_vision.training.data.batches import Pictures, training_batches, worker_count
from randlora_vision.training.data.part import Stream
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.seeding import seed_everything
from randlora_vision.training.harness.task import OwnBatches

_BUFFER = 1000  # encoded samples of a lane, among which the next one is drawn


def training_loader(
    images: Pictures, training: Training, accelerator: Accelerator, repeats: int = 1
) -> DataLoader[Any] | OwnBatches:
    """Return the batches of the training `images`, each `repeats` times in a row unless they are streamed."""
    if images.stream is None:
        count = training.batches(accelerator.num_processes)
        return training_batches(images, training.batch_size, count, training.seed, training.workers, repeats)
    return StreamedBatches(
        stream=images.stream,
        reader=images,
        batch_size=training.batch_size,
        batches=training.batches(1),
        epoch_images=training.epoch_images or 0,  # the options require it
        seed=training.seed,
        workers=training.workers,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )


@dataclass(kw_only=True)
class StreamedBatches:
    """The batches of one process. It reads its own shards, so no batch is distributed to other processes.

    Raises ValueError if there are fewer shards than processes.
    """

    stream: Stream
    reader: Pictures
    """What makes items of the images."""
    batch_size: int
    batches: int
    """The number of batches of this process."""
    epoch_images: int
    """The images of all processes in an epoch, which is rounded to whole batches of each lane."""
    seed: int
    """The seed of the order and of everything random in `reader`."""
    workers: int | None
    """Loader processes; None: chosen for the machine. There are at most as many as there are shards."""
    process: int
    processes: int

    def __post_init__(self) -> None:
        count = len(self.stream.shards)
        if count < self.processes:
            raise ValueError(
                f"{counted(count, 'shard')} cannot be divided among {self.processes} processes: start at most {count}"
            )
        self.workers = min(worker_count(self.workers, decoding=True), count // self.processes)

    @property
    def lanes(self) -> int:
        """The number of lanes of a process, W."""
        return max(1, self.workers or 0)

    @property
    def layout(self) -> Mapping[str, int]:
        """What the order of the images depends on, besides the settings of the run."""
        return {"workers that read shards": self.lanes, "shards": len(self.stream.shards)}

    def after(self, done: int) -> "DataLoader[Any]":
        """Return a loader of the batches that follow the first `done` of them."""
        return DataLoader(
            _Lanes(self, done),
            batch_size=self.batch_size,
            collate_fn=self.reader.collate,
            num_workers=self.workers or 0,
            pin_memory=torch.cuda.is_available(),
        )


class _Lanes(IterableDataset):
    """The items of the worker that iterates over it; the k-th batch of a process is of its lane k modulo W."""

    def __init__(self, own: StreamedBatches, done: int) -> None:
        self.stream, self.reader, self.batch_size, self.seed = own.stream, own.reader, own.batch_size, own.seed
        self.batches = range(done, own.batches)
        self.own = range(own.process * own.lanes, (own.process + 1) * own.lanes)
        self.lanes = own.lanes * own.processes
        self.per_epoch = max(1, round(own.epoch_images / (own.batch_size * self.lanes)))  # batches of each lane

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        numbers = self.batches[worker.id if worker else 0 :: len(self.own)]
        if not numbers:
            return
        step, place = divmod(numbers[0], len(self.own))
        yield from itertools.islice(self._items(self.own[place], step), len(numbers) * self.batch_size)

    def _items(self, lane: int, step: int) -> Iterator[Any]:
        """Yield the items of a lane, beginning with its batch `step`."""
        size = self.per_epoch * self.batch_size
        first, done = divmod(step, self.per_epoch)
        start = done * self.batch_size
        for epoch in itertools.count(first):
            samples = itertools.islice(self._samples(lane, epoch), start, None)
            for place, candidates in zip(range(start, size), _ahead(samples, most=size), strict=False):
                seed_everything("item", self.seed, lane, epoch, place)
                yield self._first_readable(candidates)
            start = 0

    def _first_readable(self, candidates: Iterator["_Sample"]) -> Any:
        for sample in candidates:
            if sample.content is not None:
                image, words = sample.content
                item = self.reader.read(image, *words)
                if item is not None:
                    return item
                sample.content = None
        raise ValueError("none of the images of an epoch can be read: see skipped.txt in the run folder")

    def _samples(self, lane: int, epoch: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yield the samples of a lane's shards in an epoch, over and over."""
        from webdataset import shuffle

        order = random.Random(f"{self.seed} {epoch}").sample(self.stream.shards, len(self.stream.shards))
        shards = order[lane :: self.lanes]
        for turn in itertools.count():
            draws = random.Random(f"{self.seed} {epoch} {lane} {turn}")
            samples = itertools.chain.from_iterable(self.stream.usable(shard, self.reader.skipped) for shard in shards)
            empty = True
            for sample in shuffle(_BUFFER, rng=draws)(samples):
                empty = False
                yield sample
            if empty:
                raise ValueError(f"nothing in the shards {listing(shards)} can be used: see skipped.txt")
            draws.shuffle(shards)


@dataclass
class _Sample:
    """A sample, until it is known that its image cannot be read."""

    content: tuple[Any, tuple[Any, ...]] | None


def _ahead(samples: Iterator[Any], most: int) -> Iterator[Iterator[_Sample]]:
    """Yield, for every sample, itself and up to `most` that come after it, which stay in their places."""
    waiting: deque[_Sample] = deque()

    def candidates() -> Iterator[_Sample]:
        for place in range(most):
            if place == len(waiting):
                waiting.append(_Sample(next(samples)))
            yield waiting[place]

    while True:
        yield candidates()
        waiting.popleft()
