"""Labels as classes: the same rule for folders, tables, shards and datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from randlora_vision.training.data.cleaning import clean_label
from randlora_vision.training.data.skipped import SkipList
from tests.data_helpers import png, read, write_images, write_shard, write_table, write_text

IMAGES = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(24)]


def as_table(folder: Path, labels: Sequence[Any]) -> Path:
    names = write_images(folder, IMAGES[: len(labels)])
    return write_table(folder / "x.csv", [{"image": n, "label": k} for n, k in zip(names, labels, strict=True)])


def as_tsv(folder: Path, labels: Sequence[Any]) -> Path:
    names = write_images(folder, IMAGES[: len(labels)])
    lines = ["image\tlabel", *(f"{n}\t{k}" for n, k in zip(names, labels, strict=True))]
    return write_text(folder / "x.tsv", "\n".join(lines))


def as_shard(folder: Path, labels: Sequence[Any]) -> Path:
    members = [(f"{n:03}", {"png": png(IMAGES[n]), "cls": str(label)}) for n, label in enumerate(labels)]
    return write_shard(folder / "x.tar", members)


def as_json(folder: Path, labels: Sequence[Any]) -> Path:
    members = [(f"{n:03}", {"png": png(IMAGES[n]), "json": {"label": label}}) for n, label in enumerate(labels)]
    return write_shard(folder / "x.tar", members)


def as_dataset(folder: Path, labels: Sequence[Any]) -> Path:
    rows = [{"image": {"bytes": png(IMAGES[n])}, "label": label} for n, label in enumerate(labels)]
    kind = datasets.Value("int64" if all(isinstance(label, int) for label in labels) else "string")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_list(rows, features).save_to_disk(folder / "saved")
    return folder / "saved"


def as_folders(folder: Path, labels: Sequence[Any]) -> Path:
    for number, label in enumerate(labels):
        (folder / "root" / str(label)).mkdir(parents=True, exist_ok=True)
        IMAGES[number].save(folder / "root" / str(label) / f"{number:03}.png")
    return folder / "root"


FORMS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "table": as_table,
    "tsv": as_tsv,
    "shard": as_shard,
    "json": as_json,
    "dataset": as_dataset,
    "folders": as_folders,
}
LABELS: dict[str, tuple[Sequence[Any], dict[str, int]]] = {
    "years": ([1990, 1991, 1992] * 4, {"1990": 4, "1991": 4, "1992": 4}),
    "identifiers": ([70123, 401234] * 4, {"70123": 4, "401234": 4}),
    "numbers in the order of their values": ([10, 9, 2] * 3, {"2": 3, "9": 3, "10": 3}),
    "white space": (["cat", " cat", "cat ", "a  dog", "a dog", "a dog"] * 2, {"a dog": 6, "cat": 6}),
    "leading zeros": (["007", "7", "08", "8"] * 2, {"7": 4, "8": 4}),
    "a word among numbers": (["007", "7", "x"] * 3, {"007": 3, "7": 3, "x": 3}),
    "accents, composed or not": (["cafe\u0301", "caf\u00e9", "tea", "tea"] * 2, {"caf\u00e9": 4, "tea": 4}),
    "case differs": (["Cat", "cat"] * 3, {"Cat": 3, "cat": 3}),
}


def counts(splits: Any) -> dict[str, int]:
    labels = Counter(label for of_split in splits.labels.values() for label in of_split)
    return {splits.class_names[label]: labels[label] for label in sorted(labels)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LABELS)
def test_distinct_labels_are_the_classes(case: str, form: str, tmp_path: Path) -> None:
    labels, truth = LABELS[case]
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(FORMS[form](tmp_path, labels), skipped)
    assert counts(splits) == truth and list(splits.class_names) == list(truth)
    changed = sum(clean_label(label) != str(label) for label in labels)
    assert skipped.changes() == ({"white space or Unicode form of a label cleaned": changed} if changed else {})
    assert ("differ only in case" in "".join(splits.notes)) == (case in ("case differs", "a word among numbers"))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "folders"])
def test_images_without_a_class_are_left_out(form: str, tmp_path: Path) -> None:
    labels = ["cat", "dog", "-1", "  ", "cat", "dog", ""]
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(FORMS[form](tmp_path, labels), skipped)
    assert counts(splits) == {"cat": 2, "dog": 2} and skipped.count() == 3


def test_classes_of_a_held_out_part_are_numbered_as_those_of_training(tmp_path: Path) -> None:
    train = as_table(tmp_path / "a", [100, 7, 30] * 3)
    val = as_table(tmp_path / "b", ["030", "7.0"])
    splits = read(train, val_data=str(val))
    assert splits.class_names == ["7", "30", "100"] and splits.labels["val"] == [1, 0]
    with pytest.raises(ValueError, match="has classes that .* lacks: 8"):
        read(train, val_data=str(as_table(tmp_path / "c", [8, 7])))


def test_one_image_with_two_spellings_of_its_class(tmp_path: Path) -> None:
    names = write_images(tmp_path, IMAGES[:4])
    rows = [{"image": name, "label": label} for name in names[:2] for label in ("cat", " cat ", "")]
    rows += [{"image": name, "label": "dog"} for name in names[2:]]
    assert counts(read(write_table(tmp_path / "x.csv", rows))) == {"cat": 2, "dog": 2}
