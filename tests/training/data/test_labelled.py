from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.data.batches import ShuffledBatches, evaluation_batches, training_batches
from randlora_vision.training.data.labelled import LabelledImages
from randlora_vision.training.data.options import DataOptions
from randlora_vision.training.data.read import read_data
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from tests.training_helpers import NO_SKIPS, write_class_folders


def names(paths: object) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in paths}  # type: ignore[attr-defined]


def read(root: Path, skipped: SkipList = NO_SKIPS, fraction: float = 0.5, seed: int = 0):
    return read_data(DataOptions(data=str(root), val_fraction=fraction, split_seed=seed), skipped)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


# Class folders


def test_a_fraction_of_every_class_is_held_out(tmp_path: Path) -> None:
    splits = read(write_class_folders(tmp_path / "data"))
    assert splits.class_names == ["one", "two", "zero"]  # by folder name
    assert Counter(splits.labels["train"]) == Counter(splits.labels["val"]) == {0: 3, 1: 3, 2: 3}
    assert not names(splits.images["train"]) & names(splits.images["val"])
    assert splits.final == "val" and "test" not in splits.images
    for split in ("train", "val"):
        for path, label in zip(splits.images[split], splits.labels[split], strict=True):
            assert path.parent.name == splits.class_names[label]


def test_the_split_is_decided_by_its_seed_and_recorded(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "data")
    first, again, other = read(root), read(root), read(root, seed=1)
    assert first.images == again.images
    assert names(first.images["val"]) != names(other.images["val"])
    record = first.record()
    assert record["sizes"] == {"train": 9, "val": 9}
    assert record["held_out"]["val"] == [str(path) for path in first.images["val"]]
    assert "seed 0" in record["origin"]


@pytest.mark.parametrize("held_out", [["val"], ["test"], ["val", "test"], ["validation"]])
def test_split_folders_are_used_as_they_are(tmp_path: Path, held_out: list[str]) -> None:
    write_class_folders(tmp_path / "train", per_class=4)
    for size, split in enumerate(held_out, start=1):
        write_class_folders(tmp_path / split, per_class=size)
    splits = read(tmp_path, fraction=0.25)
    sizes = {split: len(images) for split, images in splits.images.items()}
    assert (
        sizes
        == {
            ("val",): {"train": 12, "val": 3},
            ("test",): {"train": 9, "val": 3, "test": 3},  # validation is cut from train
            ("val", "test"): {"train": 12, "val": 3, "test": 6},
            ("validation",): {"train": 12, "val": 3},
        }[tuple(held_out)]
    )
    everything = [path for images in splits.images.values() for path in images]
    assert len(set(everything)) == len(everything)


def test_train_alone_is_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", per_class=4)
    splits = read(tmp_path)
    assert len(splits.images["train"]) == len(splits.images["val"]) == 6


def test_class_names_are_words(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "one").rename(tmp_path / "golden_retriever")
    (tmp_path / ".cache").mkdir()
    assert read(tmp_path).class_names == ["golden retriever", "two", "zero"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(("folders", "found"), [([], "no folder"), (["cat", "dog"], "cat, dog")])
def test_no_images(tmp_path: Path, folders: list[str], found: str) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"no readable images .*found {found}"):
        read(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path, classes=(0,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="only one class with images .*'zero'"):
        read(tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path, per_class=1)
    with pytest.raises(ValueError, match="the class 'one' has only one image"):
        read(tmp_path)


def test_a_validation_class_that_training_lacks(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", classes=(0, 1))
    write_class_folders(tmp_path / "val", classes=(0, 1, 2))
    with pytest.raises(ValueError, match="has classes that .* lacks: two"):
        read(tmp_path)


# Unreadable images


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    root = write_class_folders(tmp_path / "data")
    truncate(root / "one" / "000.png")
    (root / "one" / "empty.png").write_bytes(b"")
    (root / "two" / "text.jpg").write_text("this is not an image")
    Image.new("RGB", (64, 64), "red").save(root / "zero" / "whole.jpg")
    Image.effect_noise((64, 64), 50).save(root / "zero" / "cut.jpg")
    truncate(root / "zero" / "cut.jpg")
    return root


def test_unreadable_images_are_skipped_and_listed(broken: Path, tmp_path: Path) -> None:
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(broken, skipped)
    kept = names(splits.images["train"]) | names(splits.images["val"])
    assert len(kept) == 18  # 18 digits, less one, plus whole.jpg
    assert "zero/whole.jpg" in kept
    assert skipped.count() == 4
    listed = {line.split("\t")[0] for line in (tmp_path / "skipped.txt").read_text().splitlines()}
    assert {Path(path).name for path in listed} == {"000.png", "empty.png", "text.jpg", "cut.jpg"}


def test_strict_data_stops_at_the_first(broken: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the image .*one/000.png"):
        read(broken, SkipList(strict=True))


def test_an_image_that_breaks_later_is_left_out_of_its_batch(tmp_path: Path) -> None:
    """A file that is broken in the middle, which only decoding detects."""
    root = write_class_folders(tmp_path / "data", per_class=2)
    paths = sorted(root.rglob("*.png"))
    content = bytearray(paths[1].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    paths[1].write_bytes(content)
    skipped = SkipList(tmp_path / "skipped.txt")
    data = LabelledImages(paths, range(6), to_tensor, skipped)
    for workers in (0, 1):
        (batch,) = evaluation_batches(data, batch_size=6, workers=workers)
        assert batch["labels"].tolist() == [0, 2, 3, 4, 5]
        assert batch["images"].shape == (5, 3, 32, 32)
    assert skipped.count() == 1  # recorded once by each process

    strict = LabelledImages(paths, range(6), to_tensor, SkipList(strict=True))
    with pytest.raises(ValueError, match="cannot read the image"):
        next(iter(evaluation_batches(strict, batch_size=6, workers=0)))


# Batches


def test_every_pass_has_every_item_once() -> None:
    order = [index for batch in ShuffledBatches(items=10, batch_size=4, batches=5, seed=0) for index in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_batches_are_full_even_when_larger_than_the_data() -> None:
    batches = list(ShuffledBatches(items=3, batch_size=7, batches=4, seed=0))
    assert [len(batch) for batch in batches] == [7] * 4


def test_the_order_is_decided_by_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        torch.rand(1)  # global state has no effect
        return list(ShuffledBatches(20, 5, 3, seed))

    assert order(0) == order(0) != order(1)


def test_repeated_images_are_those_of_timms_sampler() -> None:
    """Of two processes, whose batches together are one step: there, the copies of an image are in different ones."""
    repeated = list(ShuffledBatches(items=12, batch_size=6, batches=4, seed=0, repeats=3))
    assert list(ShuffledBatches(12, 6, 4, 0, repeats=3)) == repeated
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    given = {"num_replicas": 2, "shuffle": False, "selected_round": 0}  # older timm has no short epochs otherwise
    samplers = [RepeatAugSampler(order, rank=rank, **given) for rank in range(2)]
    theirs = [order[i] for pair in zip(*samplers, strict=True) for i in pair]
    assert repeated[0] + repeated[1] == theirs and len(set(theirs)) == 4
    assert {*repeated[2], *repeated[3]} != set(theirs)


def test_training_batches_hold_images_and_labels() -> None:
    images = [Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)) for value in range(5)]
    data = LabelledImages(images, range(5), to_tensor, NO_SKIPS)
    batches = list(training_batches(data, batch_size=2, batches=3, seed=0, workers=0))
    assert len(batches) == 3
    for batch in batches:
        assert batch["images"].dtype == torch.float32
        assert (batch["images"][:, 0, 0, 0] * 255).round().tolist() == batch["labels"].tolist()


# The embedded digits


def test_digits_are_split_once_and_for_all() -> None:
    splits = digits.read_digits()
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 1000, "val": 198, "test": 599}
    for labels in splits.labels.values():
        counts = Counter(labels)
        assert max(counts.values()) <= 1.15 * min(counts.values())  # stratified
    some = digits.read_digits(range(5))
    assert set(some.labels["test"]) == {0, 1, 2, 3, 4}
    assert some.class_names == ["zero", "one", "two", "three", "four"]


def test_inverting_swaps_background_and_foreground() -> None:
    upright, inverted = digits.read_digits(), digits.read_digits(inverted=True)
    for one, other in zip(upright.images["test"][:20], inverted.images["test"][:20], strict=True):
        total = np.asarray(one).astype(int) + np.asarray(other)
        assert abs(total - 255).max() <= 1  # resizing rounds
    corner = inverted.augment(Image.new("RGB", (32, 32), "white"))  # type: ignore[misc]
    assert np.asarray(corner).min() == 255  # corners of a rotated picture are background
