"""WebDataset shards: broken shards, patterns, and the same order for any number of processes."""

from __future__ import annotations

import bz2
import gzip
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.data.batches import training_batches
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tar_shards import shard_paths
from randlora_vision.training.harness.seeding import seeded_items
from tests.data_helpers import (
    DIGITS,
    contents,
    listed,
    pixels,
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
    indices = [i for batch in training_batches(data, 4, 6, seed=0, workers=1) for i in batch["indices"].tolist()]
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
        seeded_items(training_batches(data, 3, 8, seed=5, workers=workers), 0),
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


# Which members belong together, and which files are shards


def members_of(kind: str) -> list[tuple[str, dict[str, Any]]]:
    images = [(f"{n:03}", {"png": png(image)}) for n, (image, _) in enumerate(DIGITS)]
    texts: list[tuple[str, dict[str, Any]]] = [(f"{n:03}", {"txt": name}) for n, (_, name) in enumerate(DIGITS)]
    together = [(key, {**image, **text}) for (key, image), (_, text) in zip(images, texts, strict=True)]
    return {
        "usual": together,
        "images first": [*images, *texts],
        "texts first": [*texts, *images],
        "shuffled": [*texts[6:], *images[:3], *texts[:6], *images[3:]],
        "two folders": [
            (f"{folder}/{key}", m) for folder, part in (("img", images), ("txt", texts)) for key, m in part
        ],
        "capital letters": [(key, {k.upper(): v for k, v in m.items()}) for key, m in together],
        "other captions": [(key, {"png": m["png"], "caption": m["txt"]}) for key, m in together],
        "resource forks": [*together, *((f"__MACOSX/._{key}", {"png": b"?", "txt": "?"}) for key, _ in images)],
        "in the folder .": [(f"./{key}", m) for key, m in together],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["usual", "images first", "texts first", "shuffled", "two folders", "capital letters", "other captions"]
    + ["resource forks", "in the folder ."],
)
def test_members_in_any_order(kind: str, tmp_path: Path) -> None:
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(write_shard(tmp_path / "x.TAR", members_of(kind)), skipped)
    found = sorted(contents(splits, "train") + contents(splits, "val"))
    assert found == sorted((pixels(image), (name,)) for image, name in DIGITS) and skipped.count() == 0


def test_a_name_used_twice_is_two_samples(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", [("a", {"png": png(image), "txt": name}) for image, name in DIGITS])
    splits = read(path)
    assert sum(len(images) for images in splits.images.values()) == len(DIGITS)


def test_only_texts_of_the_same_name_are_joined(tmp_path: Path) -> None:
    """Two folders of texts: it cannot be known which one is meant."""
    members = [("img/0", {"png": png(DIGITS[0][0])}), ("a/0", {"txt": "x"}), ("b/0", {"txt": "y"})]
    members += [(f"img/{n}", {"png": png(DIGITS[n][0]), "txt": "z"}) for n in range(1, 5)]
    skipped = SkipList(tmp_path / "skipped.txt")
    read(write_shard(tmp_path / "x.tar", members), skipped)
    assert skipped.count() == 3


def write_four(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image, word = DIGITS[number]
        write_shard(folder / name, [(f"{number}-{k}", {"png": png(image), "txt": f"{word} {k}"}) for k in range(4)])


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("x-{000,002}.tar", ("x-000.tar", "x-002.tar")),
        ("x-000.tar::x-001.tar", ("x-000.tar", "x-001.tar")),
        ("x-{000..001}.tar::y[1].tar", ("x-000.tar", "x-001.tar", "y[1].tar")),
        ("y[1].tar", ("y[1].tar",)),
        ("[x]-00[12].tar", ("x-001.tar", "x-002.tar")),
        ("{x-{000,001},y[1]}.tar", ("x-000.tar", "x-001.tar", "y[1].tar")),
        ("z.TAR", ("z.TAR",)),
    ],
)
def test_spellings_of_several_shards(
    spec: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_four(tmp_path, "x-000.tar", "x-001.tar", "x-002.tar", "y[1].tar", "z.TAR")
    monkeypatch.chdir(tmp_path)
    splits = read(spec)
    found = Counter(image.shard.name for images in splits.images.values() for image in images)
    assert found == dict.fromkeys(names, 4)
    absolute = "::".join(str(tmp_path / part) for part in spec.split("::"))
    assert sum(len(images) for images in read(absolute).images.values()) == 4 * len(names)


def test_folders_and_files_named_after_splits(tmp_path: Path) -> None:
    write_four(tmp_path / "a" / "Training", "0.tar", "1.tar")
    write_four(tmp_path / "a" / "test", "0.tar")
    write_four(tmp_path / "b", "set-train-0.tar", "set-train-1.tar", "set-val-0.tar", "other.tar")
    skipped = SkipList(tmp_path / "skipped.txt")
    sizes = [{k: len(v) for k, v in read(tmp_path / name, skipped, val_fraction=0.25).images.items()} for name in "ab"]
    assert sizes == [{"train": 6, "val": 2, "test": 4}, {"train": 8, "val": 4}]
    assert set(listed(tmp_path / "skipped.txt")) == {"other.tar"}


@pytest.mark.parametrize(
    ("suffix", "kind"), [("tar.gz", "gzip"), ("tgz", "gzip"), ("tar.bz2", "bzip2"), ("tar", "gzip")]
)
def test_compressed_shards_are_refused_with_the_reason(suffix: str, kind: str, tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "y", members_of("usual")).read_bytes()
    path = tmp_path / f"x.{suffix}"
    path.write_bytes({"gzip": gzip, "bzip2": bz2}[kind].compress(whole))
    with pytest.raises(ValueError, match=f"x.{suffix}: the shard cannot be read: it is compressed by {kind}"):
        read(path)


def test_a_shard_that_was_cut_between_members_or_has_another_behind_it(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "x.tar", members_of("usual")).read_bytes()
    places = [place for place in range(0, len(whole), 512) if whole[place:].startswith(b"00")]
    for content, samples, reason in (
        (whole[: places[10]], 5, "the mark of its end is missing"),
        (whole + whole, 12, "more data follows its end"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        skipped = SkipList(tmp_path / "skipped.txt")
        assert sum(len(images) for images in read(tmp_path / "x.tar", skipped).images.values()) == samples
        assert reason in listed(tmp_path / "skipped.txt")["x.tar"]
        (tmp_path / "skipped.txt").unlink()
