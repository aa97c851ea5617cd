"""Which part of the data is for training and which is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from randlora_vision.training.data.part import Part
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.splits import make_splits
from tests.data_helpers import (
    DIGITS,
    contents,
    hf,
    listed,
    pixels,
    read,
    some_digits,
    table,
    write_images,
    write_table,
    write_text,
)
from tests.training_helpers import write_class_folders


def test_validation_data_apart(tmp_path: Path) -> None:
    path = table(tmp_path)
    write_images(tmp_path / "more", [image for image, _ in some_digits(6)[4:6]])
    rows = [{"image": f"{n:03}.png", "text": f"text {n}"} for n in range(2)]
    splits = read(path, val_data=str(write_table(tmp_path / "more" / "val.tsv", rows, "\t")))
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 12, "val": 2}
    assert splits.captions["val"] == [["text 0"], ["text 1"]] and "own val" in splits.origin


def test_validation_data_of_a_folder_and_of_a_split(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "a", per_class=3)
    for split, count in (("train", 2), ("test", 1)):
        write_class_folders(tmp_path / "b" / split, per_class=count)
    splits = read(root, val_data=str(tmp_path / "b"))
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 9, "val": 3}
    assert {image.parent.parent.name for image in splits.images["val"]} == {"test"}


WRONG_VALIDATION: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (lambda folder: table(folder / "x", "label"), "has images with captions, but .* with classes"),
    "nothing in it": (lambda folder: write_text(folder / "x.csv", "image,text\n"), "no readable images in .*x.csv"),
    "not there": (lambda folder: folder / "nowhere.csv", "nowhere.csv"),
}


@pytest.mark.parametrize("case", WRONG_VALIDATION)
def test_wrong_validation_data(case: str, tmp_path: Path) -> None:
    write, message = WRONG_VALIDATION[case]
    (tmp_path / "x").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(table(tmp_path), val_data=str(write(tmp_path)))


def test_a_class_that_training_lacks(tmp_path: Path) -> None:
    write_images(tmp_path, [DIGITS[0][0]])
    val = write_table(tmp_path / "val.csv", [{"image": "000.png", "label": "nine"}])
    with pytest.raises(ValueError, match="val.csv has classes that .*data.csv lacks: nine"):
        read(table(tmp_path, "label"), val_data=str(val))


def test_a_dataset_with_all_splits(tmp_path: Path) -> None:
    whole = hf(tmp_path, "label")
    parts = {
        "train": whole.select(range(0, 12, 2)),
        "validation": whole.select([1, 5, 9]),
        "test": whole.select([3, 7]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    splits = read(tmp_path / "saved")
    for ours, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        truth = sorted((pixels(DIGITS[n][0]), DIGITS[n][1]) for n in parts[theirs]["number"])
        assert contents(splits, ours) == truth


def test_rows_and_a_split_without_classes(tmp_path: Path) -> None:
    """On the Hub, the classes of a test split may be hidden: -1."""
    whole = hf(tmp_path, "label")
    secret = whole.map(lambda row: {"label": -1})
    some = whole.map(lambda row: {"label": -1 if row["number"] in (2, 5) else row["label"]})
    datasets.DatasetDict({"train": some, "test": secret}).save_to_disk(tmp_path / "saved")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(tmp_path / "saved", skipped, val_fraction=0.3)
    truth = sorted((pixels(image), name) for n, (image, name) in enumerate(DIGITS) if n not in (2, 5))
    assert sorted(contents(splits, "train") + contents(splits, "val")) == truth
    assert splits.final == "val"
    assert sorted(key.rpartition("image ")[2] for key in listed(tmp_path / "skipped.txt")) == [
        "2 of Dataset",
        "5 of Dataset",
    ]


@pytest.mark.parametrize("shots", [1, 2])
def test_shots_of_every_class(shots: int, tmp_path: Path) -> None:
    whole = read(table(tmp_path, "label"), val_fraction=0.25)
    few = read(table(tmp_path, "label"), val_fraction=0.25, shots=shots)
    assert Counter(few.labels["train"]) == {0: shots, 1: shots, 2: shots}
    assert few.images["val"] == whole.images["val"] and not set(few.images["train"]) & set(few.images["val"])
    assert [whole.images["train"][i] for i in few.chosen] == few.images["train"]
    assert len(set(few.images["train"])) == 3 * shots
    assert few.record()["chosen"] == list(few.chosen) and f"{shots} shots a class" in few.record()["origin"]


def test_too_few_images_for_the_shots(tmp_path: Path) -> None:
    path = table(tmp_path, "label")
    lines = path.read_text().splitlines()
    write_text(path, "\n".join(lines[:-2]))  # the last class has two images, one of which is for training
    splits = read(path, val_fraction=0.25, shots=3)
    assert Counter(splits.labels["train"]) == {0: 3, 1: 1, 2: 3}
    assert splits.notes == ("1 of 3 classes have fewer than 3 training images: 'two' has 1",)


@pytest.mark.parametrize("column", ["label", "caption"])
def test_a_fraction_of_the_training_images(column: str, tmp_path: Path) -> None:
    path = table(tmp_path, column)
    whole, part = read(path, val_fraction=0.25), read(path, val_fraction=0.25, train_fraction=0.5)
    other = read(path, val_fraction=0.25, train_fraction=0.5, split_seed=1)
    assert len(part.images["train"]) == {"label": 6, "caption": 4}[column]
    assert [whole.images["train"][i] for i in part.chosen] == part.images["train"]
    assert part.images["val"] == whole.images["val"] != other.images["val"]
    assert set(contents(part, "train")) <= set(contents(whole, "train"))
    if column == "label":
        assert Counter(part.labels["train"]) == {0: 2, 1: 2, 2: 2}


def test_pairs_held_out_are_at_most_a_thousand() -> None:
    part = Part("x", [Image.new("RGB", (1, 1))] * 6000, captions=[["a"]] * 6000)
    splits = make_splits("x", {"train": part}, 0.2, 0)
    assert [len(splits.images[name]) for name in ("train", "val")] == [5000, 1000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 2, "train_fraction": 0.5}, "give only one"),
        ({"train_fraction": 0.0}, "--train-fraction must be above 0"),
        ({"train_fraction": 1.1}, "--train-fraction must be above 0"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"shots": 0}, "--shots must be 1"),
    ],
)
def test_wrong_parts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("x", **options)
