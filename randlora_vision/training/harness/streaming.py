"""Training batches from shards that are read in order while training goes on, each by one worker of one process.

The workers of all processes are lanes. In every epoch, the shards are put in an order that depends on the seed and the
epoch alone. Each lane takes every L-th of them, shuffles their samples in a buffer, and gives as many batches as the
others; if its shards have too few samples, it begins with them again. What a lane gives in an epoch depends on nothing
before, so a resumed run reads again only the epoch in which it was stopped, without decoding what it has had.

Shapes: P processes, W workers each, L = P * W lanes, B images in a batch.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from randlora_vision.names import listing
from randlora_vision.training.data.batches import Pictures, worker_count
from randlora_vision.training.data.part import Stream
from randlora_vision.training.harness.seeding import seed_everything

_BUFFER = 1000  # encoded samples of a lane, among which the next one is drawn


class StreamedBatches:
    """The batches of one process. It reads its own shards, so that no batch is shared out to other processes."""

    def __init__(
        self,
        stream: Stream,
        reader: Pictures,
        batch_size: int,
        batches: int,
        epoch_images: int,
        seed: int,
        workers: int | None,
        process: int,
        processes: int,
    ) -> None:
        """Divide the shards.

        Args:
            stream: The shards.
            reader: What makes items of their images.
            batch_size: B.
            batches: The number of batches of this process.
            epoch_images: The images of all processes in an epoch, which is rounded to whole batches of each lane.
            seed: Of the order and of everything random that `reader` does.
            workers: Loader processes; None: chosen for the machine. There are at most as many as there are shards.
            process: Which of the processes this one is, from 0.
            processes: P.

        Raises:
            ValueError: If there are fewer shards than processes.
        """
        count = len(stream.shards)
        if count < processes:
            raise ValueError(f"{count} shards cannot be divided among {processes} processes: start at most {count}")
        self.workers = min(worker_count(workers, decoding=True), count // processes)
        self._stream, self._reader = stream, reader
        self._batch_size, self._batches, self._seed = batch_size, batches, seed
        self._process, self._processes, self._epoch_images = process, processes, epoch_images

    @property
    def layout(self) -> Mapping[str, int]:
        """What the order of the images depends on, besides the settings of the run."""
        return {"workers that read shards": max(1, self.workers), "shards": len(self._stream.shards)}

    def after(self, done: int) -> "DataLoader[Any]":
        """Return a loader of the batches that follow the first `done` of them."""
        lanes = max(1, self.workers)
        items = _Lanes(
            self._stream,
            self._reader,
            self._batch_size,
            range(done, self._batches),
            max(1, round(self._epoch_images / (self._batch_size * lanes * self._processes))),
            self._seed,
            range(self._process * lanes, (self._process + 1) * lanes),
            lanes * self._processes,
        )
        return DataLoader(
            items,
            batch_size=self._batch_size,
            collate_fn=self._reader.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )


@dataclass(frozen=True)
class _Lanes(IterableDataset):
    """The items of the worker that iterates over it; the k-th batch of a process is of its lane k modulo W."""

    stream: Stream
    reader: Pictures
    batch_size: int
    batches: range  # the numbers of the batches that remain
    per_epoch: int  # batches of each lane
    seed: int
    own: range  # the lanes of this process
    lanes: int

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        numbers = self.batches[worker.id if worker else 0 :: len(self.own)]
        if not numbers:
            return
        step, place = divmod(numbers[0], len(self.own))
        yield from itertools.islice(self._items(self.own[place], step), len(numbers) * self.batch_size)

    def _items(self, lane: int, step: int) -> Iterator[Any]:
        """Yield the items of a lane from its batch `step` on."""
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
        """Yield the samples of a lane's shards of an epoch, again and again."""
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
