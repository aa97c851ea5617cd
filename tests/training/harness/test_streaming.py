"""Batches from streamed shards: divided among processes and workers, shuffled, and exact wherever they go on."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from randlora_vision.training.data.labelled import LabelledImages
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tar_stream import StreamedImage
from randlora_vision.training.harness.streaming import StreamedBatches

pytest.importorskip("webdataset")
PER_SHARD = 6


class Numbers:
    """Shards of one-pixel images with consecutive numbers as labels; those in `broken` cannot be read."""

    def __init__(self, shards: int, broken: Sequence[int] = (), empty: Sequence[int] = ()) -> None:
        self.shards = [str(n) for n in range(shards)]
        self.broken, self.empty = broken, empty
        self.read: list[str] = []

    def usable(self, shard: str, skipped: SkipList) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        self.read.append(shard)
        for number in range(int(shard) * PER_SHARD, (int(shard) + 1) * PER_SHARD):
            stream = io.BytesIO()
            Image.new("RGB", (1, 1)).save(stream, "PPM")
            content = b"?" if number in self.broken else stream.getvalue()
            if int(shard) not in self.empty:
                yield StreamedImage(shard, f"{number}.ppm", content), (number,)

    def from_classes(self, prompts: Sequence[Sequence[str]]) -> Any: ...


def noise(image: Image.Image) -> torch.Tensor:
    return torch.rand(1)


def batches_of(
    stream: Numbers,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    skipped: SkipList | None = None,
    **changes: Any,
) -> StreamedBatches:
    reader = LabelledImages([], [], noise, skipped or SkipList())
    epoch_images = changes.pop("epoch_images", len(stream.shards) * PER_SHARD)
    values = {"batch_size": 2, "batches": 18, "epoch_images": epoch_images, "seed": 0, **changes}
    return StreamedBatches(
        stream=stream, reader=reader, workers=workers, process=process, processes=processes, **values
    )


def numbers(batches: StreamedBatches, done: int = 0) -> list[tuple[list[int], list[float]]]:
    return [(batch["labels"].tolist(), batch["images"].flatten().tolist()) for batch in batches.after(done)]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_every_image_is_in_every_epoch_once(processes: int, workers: int) -> None:
    stream = Numbers(4)
    parts = [numbers(batches_of(stream, p, processes, workers)) for p in range(processes)]
    per_epoch = 4 * PER_SHARD // 2 // processes  # batches of a process
    assert [len(part) for part in parts] == [18] * processes
    epochs = [
        [label for part in parts for labels, _ in part[start : start + per_epoch] for label in labels]
        for start in range(0, 18 // per_epoch * per_epoch, per_epoch)
    ]
    assert all(sorted(epoch) == list(range(4 * PER_SHARD)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # in another order each time
    assert epochs[0] != sorted(epochs[0])
    values = [value for part in parts for _, batch in part for value in batch]
    assert len(set(values)) == len(values)  # nothing random is drawn twice
    assert batches_of(stream, 0, processes, workers).layout["workers that read shards"] == max(
        1, min(workers, 4 // processes)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_batch(workers: int) -> None:
    stream = Numbers(6, broken=(3, 4, 17, 35))
    batches = batches_of(stream, 1, 2, workers, epoch_images=20, batches=14)
    everything = numbers(batches)
    assert len(everything) == 14
    for done in (1, 2, 3, 5, 9, 13, 14) if workers == 0 else (5, 8):
        assert numbers(batches, done) == everything[done:]
    assert numbers(batches_of(stream, 1, 2, workers, epoch_images=20, batches=14, seed=1)) != everything


def test_going_on_reads_one_epoch_again() -> None:
    stream = Numbers(4)
    loader = batches_of(stream, epoch_images=PER_SHARD * 4, batches=36).after(25)  # in the third epoch
    stream.read.clear()
    next(iter(loader))
    assert sorted(stream.read) == ["0", "1", "2", "3"]  # all of them are in the buffer


def test_a_lane_with_too_few_images_begins_again() -> None:
    stream = Numbers(2, empty=(1,))
    labels = [label for labels, _ in numbers(batches_of(stream, epoch_images=14, batches=7)) for label in labels]
    assert set(Counter(labels[:6]).values()) == set(Counter(labels[6:12]).values()) == {1}
    with pytest.raises(ValueError, match="nothing in the shards 1 can be used: see skipped.txt"):
        [numbers(batches_of(stream, process, 2)) for process in (0, 1)]


def test_images_that_cannot_be_read_are_replaced_by_the_next(tmp_path: Path) -> None:
    whole = [labels for labels, _ in numbers(batches_of(Numbers(2)))]
    skipped = SkipList(tmp_path / "skipped.txt")
    broken = whole[1] + whole[2][:1]
    found = [labels for labels, _ in numbers(batches_of(Numbers(2, broken), skipped=skipped))]
    assert found[:4] == [whole[0], [whole[2][1]] * 2, [whole[2][1]] * 2, whole[3]]
    assert skipped.count() == 3
    with pytest.raises(ValueError, match="none of the images of an epoch can be read"):
        numbers(batches_of(Numbers(2, broken=range(100))))


def test_fewer_shards_than_processes() -> None:
    with pytest.raises(ValueError, match="2 shards cannot be divided among 3 processes: start at most 2"):
        batches_of(Numbers(2), processes=3)
