"""Every kind of data that train_clip.py reads; all of them must give the same digits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from torchvision.datasets import FakeData

from randlora_vision.training.data.captioned import PairSplits
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.skipped import SkipList
from tests.data_helpers import (
    DIGITS,
    caption,
    contents,
    listed,
    mnist,
    parquet,
    pixels,
    png,
    read,
    saved,
    shards,
    some_digits,
    table,
    write_images,
    write_shard,
    write_table,
    write_text,
)
from tests.training_helpers import write_class_folders

PAIRS: dict[str, Callable[[Path], Any]] = {
    "csv": table,
    "tsv": lambda folder: table(folder, suffix=".tsv"),
    "shards": shards,
    "shards with json": lambda folder: shards(folder, "json"),
    "one shard": lambda folder: shards(folder, count=1).replace("{00..00}", "00"),
    "folder of shards": lambda folder: Path(shards(folder)).parent,
    "glob of shards": lambda folder: Path(shards(folder)).parent / "train-*.tar",
    "saved dataset": saved,
    "dataset by name": parquet,
}
CLASSES: dict[str, Callable[[Path], Any]] = {
    "folders": lambda folder: write_class_folders(folder, per_class=4),
    "folders beside their archive": lambda folder: (
        write_class_folders(folder, per_class=4),
        shards(folder),
    )[0],
    "csv": lambda folder: table(folder, "label"),
    "saved dataset": lambda folder: saved(folder, "label"),
    "dataset by name": lambda folder: parquet(folder, "label"),
}


@pytest.mark.parametrize("source", PAIRS)
def test_image_text_pairs(source: str, tmp_path: Path) -> None:
    splits = read(PAIRS[source](tmp_path), data_root=str(tmp_path / "cache"), val_fraction=0.25)
    assert isinstance(splits, PairSplits)
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 9, "val": 3}
    everything = sorted(contents(splits, "train") + contents(splits, "val"))
    assert everything == sorted((pixels(image), (caption(name),)) for image, name in DIGITS)
    held_out = splits.record()["held_out"]["val"]
    assert len(set(held_out)) == 3 and "seed 0" in splits.record()["origin"]


@pytest.mark.parametrize("source", CLASSES)
def test_images_with_classes(source: str, tmp_path: Path) -> None:
    splits = read(CLASSES[source](tmp_path), data_root=str(tmp_path / "cache"), val_fraction=0.25)
    assert isinstance(splits, ImageSplits)
    assert sorted(splits.class_names) == ["one", "two", "zero"]
    assert Counter(splits.labels["train"]) == {0: 3, 1: 3, 2: 3}
    everything = sorted(contents(splits, "train") + contents(splits, "val"))
    assert everything == sorted((pixels(image), name) for image, name in DIGITS)


@pytest.mark.parametrize(("kind", "options"), [("cls", {}), ("key", {"label_column": "kind"})])
def test_classes_in_shards(kind: str, options: dict[str, str], tmp_path: Path) -> None:
    if kind == "cls":
        (tmp_path / "names.txt").write_text("zero\n\none\ntwo\n")
        options = {"class_names": str(tmp_path / "names.txt")}
    splits = read(shards(tmp_path, kind), **options)
    everything = sorted(contents(splits, "train") + contents(splits, "val"))
    assert everything == sorted((pixels(image), name) for image, name in DIGITS)


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    names = write_images(tmp_path, [image for image, _ in DIGITS])
    labels = [2, 10, 0, 2, 10, 0, 0, 0, 2, 10, 2, 10]
    path = write_table(tmp_path / "x.csv", [{"path": n, "label": k} for n, k in zip(names, labels, strict=True)])
    splits = read(path)
    assert splits.class_names == ["0", "2", "10"]
    found = {
        Path(image).name: int(splits.class_names[label])
        for s in ("train", "val")
        for image, label in zip(splits.images[s], splits.labels[s], strict=True)
    }
    assert found == dict(zip(names, labels, strict=True))


def test_torchvision(tmp_path: Path) -> None:
    splits = read(mnist(tmp_path), data_root=str(tmp_path))
    assert splits.class_names[3] == "3"
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 50, "val": 10, "test": 20}
    assert splits.labels["test"] == [number for number in range(10) for _ in range(2)]
    images = {pixels(image.resize((28, 28))) for image, _ in some_digits(6, range(10))}
    assert {pixels(image) for split in ("train", "val") for image in splits.images[split]} == images

    one = read("torchvision:MNIST@test", data_root=str(tmp_path), val_fraction=0.5)
    assert {name: len(images) for name, images in one.images.items()} == {"train": 10, "val": 10}


@pytest.mark.slow  # it has no list of labels, so all its images are generated
def test_torchvisions_fake_data_has_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeData.__init__, "__defaults__", (100, (3, 8, 8), 10, None, None, 0))  # 1000 larger images
    splits = read("torchvision:FakeData")
    assert len(splits.images["train"]) + len(splits.images["val"]) == 100 and len(splits.class_names) == 10


def test_digits_as_pairs() -> None:
    pairs, classes = read("digits-pairs"), read_embedded()
    assert isinstance(pairs, PairSplits) and len(pairs.captions["train"][0]) == 5
    assert [pixels(image) for image in pairs.images["val"]] == [pixels(image) for image in classes.images["val"]]
    name = classes.class_names[classes.labels["train"][7]]
    assert all(name in text for text in pairs.captions["train"][7])


def read_embedded() -> Any:
    from randlora_vision.training.data.options import ImageOptions
    from randlora_vision.training.data.read import read_data

    return read_data(ImageOptions(), SkipList())


# Columns


def test_columns_by_flag(tmp_path: Path) -> None:
    names = write_images(tmp_path, [image for image, _ in DIGITS])
    rows = [
        {"a": file, "b": "x", "c": f"{name}, maybe", "image": "?"}
        for file, (_, name) in zip(names, DIGITS, strict=True)
    ]
    splits = read(write_table(tmp_path / "x.csv", rows), image_column="a", caption_column="c")
    assert {texts for texts in map(tuple, splits.captions["train"])} == {
        (f"{n}, maybe",) for n in ("zero", "one", "two")
    }


def test_lines_of_the_same_image_are_its_captions(tmp_path: Path) -> None:
    names = write_images(tmp_path, [image for image, _ in DIGITS])
    rows = [{"image": name, "text": f"{name} {n}"} for n in range(3) for name in names]
    splits = read(write_table(tmp_path / "x.csv", rows))
    for split in ("train", "val"):
        for image, texts in zip(splits.images[split], splits.captions[split], strict=True):
            assert texts == [f"{image.name} {n}" for n in range(3)]
    assert not set(splits.images["train"]) & set(splits.images["val"])


def test_several_captions_in_a_dataset_and_in_shards(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = [{"image": {"bytes": png(image)}, "text": [name, " "] * 2} for image, name in DIGITS]
    datasets.Dataset.from_list(rows, features).save_to_disk(tmp_path / "saved")
    assert set(map(tuple, read(tmp_path / "saved").captions["train"])) == {(n, n) for n in ("zero", "one", "two")}

    path = write_shard(
        tmp_path / "x.tar", [(f"{n}", {"png": png(i), "json": {"text": ["a", "b"]}}) for n, (i, _) in enumerate(DIGITS)]
    )
    assert set(map(tuple, read(path).captions["train"])) == {("a", "b")}


def bad_column(folder: Path) -> str:
    return str(write_table(folder / "x.csv", [{"url": "a", "words": "b"}]))


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no image column": (
        bad_column,
        {},
        "x.csv has no column .* images: name it with --image-column; it has url, words",
    ),
    "no caption column": (bad_column, {"image_column": "url"}, "--caption-column or --label-column; it has url, words"),
    "wrong image column": (
        bad_column,
        {"image_column": "uri"},
        r"no column 'uri' \(--image-column\); it has url, words",
    ),
    "wrong caption column": (
        lambda folder: table(folder),
        {"caption_column": "kaption"},
        r"no column 'kaption' \(--caption-column\); it has filepath, caption",
    ),
    "two kinds": (lambda folder: table(folder), {"caption_column": "a", "label_column": "b"}, "give only one"),
    "empty table": (lambda folder: write_text(folder / "x.csv", ""), {}, "x.csv is empty"),
    "no lines": (lambda folder: write_text(folder / "x.csv", "image,text\n"), {}, "no readable images in .*x.csv"),
    "no text": (
        lambda folder: write_text(folder / "x.csv", b"image,text\n\xff\xfe"),
        {},
        "x.csv is not UTF-8 text .line 2, byte 0xff.; .* iconv",
    ),
    "images not there": (
        lambda folder: write_text(folder / "x.csv", "image,text\na.png,b\n"),
        {},
        "no readable images",
    ),
    "one image": (
        lambda folder: (write_images(folder, [DIGITS[0][0]]), write_text(folder / "x.csv", "image,text\n000.png,b\n"))[
            1
        ],
        {},
        "has only one image, which cannot be used for both training and validation",
    ),
    "two classes of one image": (
        lambda folder: (
            write_images(folder, [DIGITS[0][0]]),
            write_text(folder / "x.csv", "image,label\n000.png,b\n000.png,a\n"),
        )[1],
        {},
        "gives the image 000.png two classes: a and b",
    ),
    "no such file": (lambda folder: folder / "nowhere.csv", {}, "nowhere.csv"),
    "no such folder": (lambda folder: folder / "nowhere", {}, "does not exist"),
    "another file": (lambda folder: write_text(folder / "x.zip", "PK"), {}, "must be a .csv, a .tsv or a .tar"),
    "remote": (lambda folder: "https://host/x-{00..10}.tar", {}, "read from disk only"),
    "pipe": (lambda folder: "pipe:cat x.tar", {}, "read from disk only"),
    "no shards": (lambda folder: folder / "x-{00..10}.tar", {}, "no shard found: .*x-{00..10}.tar"),
    "shards without words": (
        lambda folder: write_shard(folder / "x.tar", [("a", {"png": png(DIGITS[0][0]), "json": {"size": 1}})]),
        {},
        "no sample has a caption .* apart from images there are .json, and in .json the keys size",
    ),
    "shards without the key": (
        lambda folder: write_shard(folder / "x.tar", [("a", {"png": png(DIGITS[0][0]), "json": {"size": 1}})]),
        {"caption_column": "alt"},
        "no sample has 'alt' in its .json; .* keys size",
    ),
    "shards without images": (
        lambda folder: write_shard(folder / "x.tar", [("a", {"npy": b"1", "txt": "one"})]),
        {},
        "no images in 1 samples",
    ),
    "unknown torchvision": (lambda folder: "torchvision:CIFAR11", {}, "close matches: CIFAR10"),
    "torchvision without root": (lambda folder: "torchvision:CIFAR10", {}, "needs --data-root"),
    "torchvision not there": (lambda folder: "torchvision:CIFAR10", {"data_root": "/nowhere"}, "--download allows"),
    "torchvision split": (lambda folder: f"{mnist(folder)}@val", {}, "no split 'val'; its splits: train and test"),
    "torchvision other split": (lambda folder: "torchvision:SVHN@all", {"data_root": "/nowhere"}, "Valid values are"),
    "torchvision captions": (lambda folder: "torchvision:CocoCaptions", {"data_root": "/nowhere"}, "cannot open"),
    "no saved split": (lambda folder: f"hf:{saved(folder)}@test", {}, "has no split 'test'; it has train"),
    "no such dataset": (lambda folder: f"hf:{folder}/nothing", {}, "cannot open the dataset"),
    "no images in the dataset": (
        lambda folder: datasets.Dataset.from_list([{"a": 1}]).save_to_disk(folder / "s") or folder / "s",
        {},
        r"no column of images; it has a \(Value\)",
    ),
    "wrong column in the dataset": (saved, {"image_column": "number"}, "'number' is not a column of images"),
    "no captions in the dataset": (saved, {"caption_column": "number"}, "'number' does not hold captions"),
    "shots of pairs": (table, {"shots": 1}, "--shots counts images per class"),
    "class names of pairs": (table, {"class_names": "x.txt"}, "has captions, not classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    write, options, message = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(write(tmp_path), **options)


# What cannot be used


def test_lines_and_images_that_cannot_be_used(tmp_path: Path) -> None:
    names = write_images(tmp_path, [image for image, _ in DIGITS])
    (tmp_path / names[3]).write_bytes((tmp_path / names[3]).read_bytes()[:-40])
    lines = ["image,text"] + [f"{name},a {n}" for n, name in enumerate(names)]
    lines[3] += ",and more"
    lines[6] = names[5]
    lines[7] = f"{names[6]}, "
    lines += [",no image", "nowhere.png,one"]
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(write_text(tmp_path / "x.csv", "\n".join(lines)), skipped)
    kept = {image.name for split in ("train", "val") for image in splits.images[split]}
    assert kept == {name for n, name in enumerate(names) if n not in (2, 3, 5, 6)}
    why = listed(skipped.path)  # type: ignore[arg-type]
    assert set(why) == {"x.csv:4", "x.csv:7", "003.png", "006.png", "x.csv:14", "nowhere.png"} and skipped.count() == 6
    assert "quote" in why["x.csv:4"] and why["006.png"] == "it is empty" and "No such file" in why["nowhere.png"]
    for bad, message in (
        (4, r"cannot use .*x.csv:4: it does not have as many"),
        (8, "cannot use the caption of .*006.png: it is"),
    ):
        write_text(
            tmp_path / "y.csv", "\n".join([lines[0], *lines[bad - 1 : bad], *lines[10:12]]).replace(",and", ", and")
        )
        with pytest.raises(ValueError, match=message.replace("x.csv:4", "y.csv:2")):
            read(tmp_path / "y.csv", SkipList(strict=True))
