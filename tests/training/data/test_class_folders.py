"""Which folders are splits and which are classes, and which files are images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from randlora_vision.training.data.options import DataOptions
from randlora_vision.training.data.read import read_data, read_evaluation
from randlora_vision.training.data.skipped import SkipList
from tests.data_helpers import listed, read
from tests.training_helpers import write_class_folders


def put(root: Path, *names: str) -> Path:
    """Write an image under each name, all different."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), hash(name) % 256, 0)).save(root / name)
    return root


def classes(root: Path, *folders: str, per_class: int = 4, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for folder in folders:
        put(root, *(f"{folder}/{name}/{folder}-{n}.png" for name in names for n in range(per_class)))
    return root


def sizes(splits: Any) -> dict[str, int]:
    return {split: len(images) for split, images in splits.images.items()}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "test_set"),
        ("train2017", "val2017", "test2017"),
        ("train_data", "valid", "test-images"),
        ("training_set", "validate", "evaluation"),
    ],
)
def test_usual_spellings_of_splits(train: str, val: str, test: str, tmp_path: Path) -> None:
    classes(tmp_path, train)
    classes(tmp_path, val, per_class=1)
    classes(tmp_path, test, per_class=2)
    splits = read(tmp_path)
    assert splits.class_names == ["cat", "dog"] and sizes(splits) == {"train": 8, "val": 2, "test": 4}
    for split, folder in (("train", train), ("val", val), ("test", test)):
        assert {path.parent.parent.name for path in splits.images[split]} == {folder}
    (note,) = splits.notes
    assert note == f"splits: train is {tmp_path / train}, val is {tmp_path / val}, test is {tmp_path / test}"


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_may_be_called_like_a_split(name: str, tmp_path: Path) -> None:
    put(tmp_path, *(f"{folder}/{n}.png" for folder in ("airplane", "bus", name) for n in range(4)))
    assert set(read(tmp_path).class_names) == {"airplane", "bus", name}


def test_a_class_called_train_inside_splits_and_with_folders_of_its_own(tmp_path: Path) -> None:
    classes(tmp_path / "a", "train", "test", names=("bus", "train"))
    assert read(tmp_path / "a").class_names == ["bus", "train"]
    put(tmp_path / "b", *(f"{folder}/{n}.png" for folder in ("bus", "train/steam", "train/electric") for n in range(4)))
    with pytest.raises(ValueError, match="are these classes .--split-folders none., or is only the former meant"):
        read(tmp_path / "b")
    assert read(tmp_path / "b", split_folders=("none",)).class_names == ["bus", "train"]
    only = read(tmp_path / "b", split_folders=("train=train",))
    assert only.class_names == ["electric", "steam"]


def test_splits_by_flag(tmp_path: Path) -> None:
    classes(tmp_path, "fit", "final")
    splits = read(tmp_path, split_folders=("train=fit", "test=final"), val_fraction=0.25)
    assert sizes(splits) == {"train": 6, "val": 2, "test": 8}
    for words in (("train=fitt",), ("trian=fit",), ("fit",), ("none", "train=fit")):
        with pytest.raises(ValueError, match="--split-folders .*: expected none or train=FOLDER .*: fi"):
            read(tmp_path, split_folders=words)


def test_folders_that_are_not_used_are_listed(tmp_path: Path) -> None:
    """A test folder without classes, as in competitions, and another folder with the same classes."""
    classes(tmp_path, "train", "extra")
    put(tmp_path, "test/1.png", "test/2.png", "train/stray.png")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(tmp_path, skipped)
    assert splits.class_names == ["cat", "dog"] and set(sizes(splits)) == {"train", "val"}
    assert set(listed(tmp_path / "skipped.txt")) == {"extra", "test", "stray.png"}


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    classes(tmp_path, "train", "val", "valid")
    with pytest.raises(ValueError, match="val, valid in .* may all be the val split: choose with --split-folders val="):
        read(tmp_path)


def test_held_out_splits_alone_can_be_evaluated(tmp_path: Path) -> None:
    classes(tmp_path, "val", "test")
    with pytest.raises(ValueError, match="has no images to train on, only .*val and .*test; --eval-only"):
        read(tmp_path)
    options = DataOptions(data=str(tmp_path))
    assert sizes(read_evaluation(options, SkipList())) == {"test": 8}
    assert sizes(read_evaluation(options, SkipList(), wanted="val")) == {"val": 8}
    assert sizes(read_evaluation(options, SkipList(), wanted="all")) == {"all": 16}


@pytest.mark.parametrize(("wanted", "count"), [(None, 24), ("all", 24), ("val", 6), ("train", 18)])
def test_evaluation_of_data_without_splits(wanted: str | None, count: int, tmp_path: Path) -> None:
    """All of it, or the part that training would hold out or use."""
    write_class_folders(tmp_path, per_class=8)
    options = DataOptions(data=str(tmp_path), val_fraction=0.25)
    whole, trained = read_evaluation(options, SkipList(), wanted=wanted), read_data(options, SkipList())
    assert len(whole.images[whole.final]) == count
    if wanted in ("train", "val"):
        assert whole.images[wanted] == trained.images[wanted]
    with pytest.raises(ValueError, match="--eval-split test: .* has no such split, only train"):
        read_evaluation(options, SkipList(), wanted="test")


def test_test_data_makes_three_disjoint_parts(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "a", per_class=4)
    write_class_folders(tmp_path / "b", per_class=2)
    splits = read(tmp_path / "a", test_data=str(tmp_path / "b"), val_fraction=0.25)
    assert sizes(splits) == {"train": 9, "val": 3, "test": 6} and splits.final == "test"
    everything = [path for images in splits.images.values() for path in images]
    assert len(set(everything)) == len(everything) == 18
    for flag in ("test_data", "val_data"):
        with pytest.raises(
            ValueError, match="share 12 images, for example .*: what is measured must not be trained on"
        ):
            read(tmp_path / "a", **{flag: str(tmp_path / "." / "a")})


def test_links_are_followed_and_hidden_files_are_not_data(tmp_path: Path) -> None:
    root = put(tmp_path / "data", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(4)))
    put(tmp_path / "elsewhere", *(f"more/deep/{n}.png" for n in range(3)))
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more", target_is_directory=True)
    (root / "dog" / "again").symlink_to(root / "dog", target_is_directory=True)  # a circle
    (root / "bird").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    put(root, "cat/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/cat/0.png", "__MACOSX/cat/0.png")
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    os.mkfifo(root / "dog" / "pipe.png")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(root, skipped)
    assert splits.class_names == ["bird", "cat", "dog"]
    found = [str(path.relative_to(root)) for images in splits.images.values() for path in images]
    expected = [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(4)]
    expected += [f"{place}/deep/{n}.png" for place in ("cat/more", "bird/more") for n in range(3)]
    assert sorted(found) == sorted(expected) and set(listed(tmp_path / "skipped.txt")) == {"pipe.png"}


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    root = put(tmp_path / "data", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    good = os.fsencode(root / "cat") + b"/caf\xe9.png"
    Image.new("RGBA", (4, 4)).save(root / "cat" / "x.png")
    os.rename(root / "cat" / "x.png", good)
    with open(os.fsencode(root / "dog") + b"/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(root, skipped, val_fraction=0.9)
    assert r"dog/caf\xe9.png" in (tmp_path / "skipped.txt").read_text(encoding="utf-8")
    assert any(name.endswith(r"cat/caf\xe9.png") for name in splits.record()["held_out"]["val"])
    data = splits.select("val", lambda picture: picture, skipped)
    assert all(data.picture(index) is not None for index in range(len(data)))
    assert skipped.count() == 1 and r"cat/caf\xe9.png" in (tmp_path / "changed.txt").read_text(encoding="utf-8")
