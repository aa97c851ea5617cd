"""WebDataset shards: broken shards, patterns, and the same order for any number of processes."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.data.captioned import pair_batches
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tar_shards import shard_paths
from randlora_vision.training.harness.seeding import seeded_items
from tests.data_helpers import (
    DIGITS,
    listed,
    png,
    read,
    shards,
    write_shard,
)


def test_an_image_inside_a_shard_that_is_broken(tmp_path: Path) -> None:
    samples = [(f"{n}", {"png": png(image), "txt": name}) for n, (image, name) in enumerate(DIGITS)]
    samples[5] = ("5", {"png": b"broken", "txt": "five"})
    samples += [("no-text", {"png": png(DIGITS[0][0])}), ("no-image", {"txt": "?"})]
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(write_shard(tmp_path / "x.tar", samples), skipped, val_fraction=0.1)
    assert set(listed(tmp_path / "skipped.txt")) == {"x.tar:no-text", "x.tar:no-image"}
    data = splits.select("train", to_tensor, lambda texts: torch.zeros(1, 2), skipped)
    indices = [i for batch in pair_batches(data, 4, 6, seed=0, workers=1) for i in batch["indices"].tolist()]
    assert len(indices) == 24 and set(listed(tmp_path / "skipped.txt")) == {
        "x.tar:no-text",
        "x.tar:no-image",
        "x.tar:5.png",
    }


BROKEN: dict[str, tuple[Callable[[bytes, int], bytes], int, str]] = {
    # Damage to a shard of four samples, the third of which starts at `place`; samples left; message.
    "cut in an image": (lambda whole, place: whole[: place + 700], 2, "after byte .*: it ends inside part/0007.png"),
    "cut in a header": (lambda whole, place: whole[: place + 100], 2, "after byte .*: no valid header there"),
    "a broken header": (
        lambda whole, place: whole[:place] + b"?" * 512 + whole[place + 512 :],
        2,
        "after byte .*: no valid header there",
    ),
    "no archive": (lambda whole, place: b"?" * 2000, 0, "the shard cannot be read: "),
    "empty": (lambda whole, place: b"", 0, "the shard cannot be read: empty file"),
    "compressed": (lambda whole, place: gzip.compress(whole), 0, "the shard cannot be read: "),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_shard_is_used_up_to_where_it_breaks(how: str, tmp_path: Path) -> None:
    damage, left, why = BROKEN[how]
    shards(tmp_path)
    path = tmp_path / "train-01.tar"
    whole = path.read_bytes()
    headers = [place for place in range(0, len(whole), 512) if whole[place:].startswith(b"part/")]
    path.write_bytes(damage(whole, headers[4]))
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(tmp_path, skipped)
    assert sum(len(splits.images[split]) for split in ("train", "val")) == 8 + left
    reason = listed(tmp_path / "skipped.txt")["train-01.tar"]
    assert re.search(why, reason) and reason.startswith("the shard cannot be read")
    with pytest.raises(ValueError, match="cannot use .*train-01.tar: the shard cannot be read"):
        read(tmp_path, SkipList(strict=True))


def test_a_missing_shard(tmp_path: Path) -> None:
    shards(tmp_path)
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(tmp_path / "train-{01..03}.tar", skipped)
    assert sum(len(splits.images[split]) for split in ("train", "val")) == 8
    assert "No such file" in listed(tmp_path / "skipped.txt")["train-03.tar"]


def test_spelling_of_shards(tmp_path: Path) -> None:
    (tmp_path / "a-008-x.tar").touch()
    found = shard_paths(str(tmp_path / "a-{008..010}-x.tar"))
    assert [path.name for path in found] == ["a-008-x.tar", "a-009-x.tar", "a-010-x.tar"]
    (tmp_path / "a-70.tar").touch()
    two = shard_paths(str(tmp_path / "a-{7..8}{0..1}.tar"))
    assert [path.name for path in two] == ["a-70.tar", "a-71.tar", "a-80.tar", "a-81.tar"]
    assert [path.name for path in shard_paths(str(tmp_path / "*-x.tar"))] == ["a-008-x.tar"]


# The order of shards, for any number of readers


def order(data: Any, workers: int, process: int = 0, processes: int = 1, start: int = 0) -> list[list[int]]:
    """Return the samples that a process reads from batch `start` on, prepared as in the training loop."""
    loader = prepare_data_loader(
        seeded_items(pair_batches(data, 3, 8, seed=5, workers=workers), 0),
        num_processes=processes,
        process_index=process,
        put_on_device=False,
    )
    return [batch["indices"].tolist() for batch in skip_first_batches(loader, start)]


def test_shards_are_read_in_one_order_by_any_number_of_processes_and_workers(tmp_path: Path) -> None:
    splits = read(shards(tmp_path), val_fraction=0.1)
    data = splits.select("train", to_tensor, lambda texts: torch.zeros(1, 2), SkipList())
    everything = order(data, workers=0)
    flat = [index for batch in everything for index in batch]
    assert sorted(flat[:11]) == sorted(flat[11:22]) == list(range(11)) and flat[:11] != list(range(11))
    assert everything == order(data, workers=2)
    assert everything[3:] == order(data, workers=1, start=3)
    first, second = (order(data, workers=1, process=process, processes=2) for process in (0, 1))
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == everything
    assert order(data, workers=0, process=1, processes=2, start=2) == second[2:]
