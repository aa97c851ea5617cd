"""Data that people have: folders from archives, links, copies, tables with splits, and names in other forms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from randlora_vision.training.data.duplicates import repeated
from randlora_vision.training.data.pictures import open_picture
from randlora_vision.training.data.skipped import SkipList
from tests.data_helpers import DIGITS, listed, png, read, write_shard, write_text


def put(*paths: Path) -> None:
    """Write an image under each name, all different."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (number, len(str(path)) % 256, 0)).save(path)


def classes(root: Path, *folders: str, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    put(
        *(
            root / folder / name / f"{folder.replace('/', '-')}-{n}.png"
            for folder in folders
            for name in names
            for n in range(4)
        )
    )
    return root


def sizes(splits: Any) -> dict[str, int]:
    return {split: len(images) for split, images in splits.images.items()}


# Folders


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train", "seg_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("archive/train", "archive/test"),
        ("1-Training", "2-Testing set"),
        ("Train Images", "images of the test"),
    ],
)
def test_archives_with_splits(folders: tuple[str, ...], tmp_path: Path) -> None:
    splits = read(classes(tmp_path, *folders))
    assert splits.class_names == ["cat", "dog"] and sizes(splits) == {"train": 6, "val": 2, "test": 8}


def test_the_only_folder_is_read_in_its_place(tmp_path: Path) -> None:
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(classes(tmp_path / "data", "images"), skipped)
    assert splits.class_names == ["cat", "dog"] and list(skipped.changes()) == [
        "the only folder in it was read in its place"
    ]
    put(tmp_path / "data" / "0.png")  # now it is not the only thing there
    with pytest.raises(ValueError, match="only one class with images"):
        read(tmp_path / "data")


@pytest.mark.parametrize("folders", [("validation", "holdout"), ("photo", "sketch"), ("fold 1", "fold 2", "fold 3")])
def test_folders_with_the_same_folders_in_them(folders: tuple[str, ...], tmp_path: Path) -> None:
    classes(tmp_path, *folders)
    with pytest.raises(ValueError, match="both contain cat, dog: are they splits .* or classes .--split-folders none."):
        read(tmp_path)
    assert len(read(tmp_path, split_folders=("none",)).class_names) == len(folders)
    chosen = (f"train={folders[1]}", f"test={folders[0]}")
    assert sizes(read(tmp_path, split_folders=chosen)) == {"train": 6, "val": 2, "test": 8}


@pytest.mark.parametrize("form", ["txt", "metadata"])
def test_captions_in_folders_of_splits(form: str, tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "validation")):
        names = [f"{n}.png" for n in range(4 - number)]
        put(*(tmp_path / folder / name for name in names), tmp_path / folder / "9.png")
        for name in names if form == "txt" else ():
            (tmp_path / folder / name).with_suffix(".txt").write_text(f"{folder} {name}")
        if form == "metadata":
            lines = [json.dumps({"file_name": name, "text": f"{folder} {name}"}) for name in names]
            (tmp_path / folder / "metadata.jsonl").write_text(
                "\n".join([*lines, '{"file_name": "9.png", "text": null}'])
            )
    splits = read(tmp_path)
    assert sizes(splits) == {"train": 4, "val": 3}
    assert splits.captions["val"] == [[f"validation {n}.png"] for n in range(3)]


def test_a_link_to_a_folder_above(tmp_path: Path) -> None:
    classes(tmp_path, "x")
    os.symlink(tmp_path / "x", tmp_path / "x" / "cat" / "all")
    os.symlink(tmp_path, tmp_path / "x" / "dog" / "all")
    assert sorted(path.parent.name for path in read(tmp_path / "x").images["train"]) == ["cat"] * 3 + ["dog"] * 3


def test_images_that_are_left_out_are_counted(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data", "x") / "x"
    cat = folder / "cat"
    os.symlink("/nowhere.png", cat / "link.png")
    os.mkfifo(cat / "pipe.png")
    (cat / "phone.HEIC").write_bytes(b"?")
    (cat / "no_suffix").write_bytes(png(DIGITS[0][0]))
    (cat / "v.JFIF").write_bytes(png(DIGITS[0][0]))
    for name in ("notes.txt", "Thumbs.db", "desktop.ini", "._0.png", "LICENSE"):
        (cat / name).write_bytes(b"?")
    put(folder / "$RECYCLE.BIN" / "0.png")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(folder, skipped)
    assert splits.class_names == ["cat", "dog"] and sum(sizes(splits).values()) == 9
    reasons = listed(tmp_path / "skipped.txt")
    assert set(reasons) == {"link.png", "pipe.png", "phone.HEIC", "no_suffix"}
    assert "not a regular file" in reasons["pipe.png"] and "convert them" in reasons["phone.HEIC"]


# Copies


def test_copies_of_training_images_among_held_out_ones_are_counted(tmp_path: Path) -> None:
    classes(tmp_path, "train", "test")
    copied = (tmp_path / "train" / "cat" / "train-0.png").read_bytes()
    (tmp_path / "test" / "cat" / "copy.png").write_bytes(copied)
    os.link(tmp_path / "train" / "dog" / "train-1.png", tmp_path / "test" / "dog" / "hard.png")
    splits = read(tmp_path, val_fraction=0.25)
    held_out = {path.name for path in splits.images["val"]} & {"train-0.png", "train-1.png"}
    count = 2 - len(held_out)
    notes = [f"{count} of the 10 test images are training images too (the same bytes)"] if count else []
    assert [note for note in splits.notes if "same bytes" in note] == notes
    os.symlink(tmp_path / "train" / "cat" / "train-0.png", tmp_path / "test" / "cat" / "link.png")
    with pytest.raises(ValueError, match="share 1 image,.*what is measured must not be trained on"):
        read(tmp_path)


def test_copies_in_shards_and_beside_them(tmp_path: Path) -> None:
    samples = [(f"{n}", {"png": png(image), "txt": "x"}) for n, (image, _) in enumerate(DIGITS)]
    shard = write_shard(tmp_path / "x.tar", samples)
    other = write_shard(tmp_path / "y.tar", samples[::3])
    train, test = (read(path, val_fraction=0.1).images for path in (shard, other))
    everything = [*train["train"], *train["val"]]
    assert repeated(everything, [*test["train"], *test["val"]]) == 4
    (tmp_path / "a.png").write_bytes(png(DIGITS[1][0]))
    (tmp_path / "b.png").write_bytes(png(DIGITS[1][0])[:-20] + b"12345678901234567890")  # of the same size
    paths = [tmp_path / name for name in ("a.png", "b.png", "nowhere.png")]
    assert repeated(everything, paths) == 1 and repeated(paths, paths[:1]) == 1 and repeated([], paths) == 0


# Tables


def table(folder: Path, text: str, count: int = 8, name: str = "x.csv") -> Path:
    put(*(folder / f"{n}.png" for n in range(count)))
    return write_text(folder / name, text)


def rows(*values: str, mark: str = ",") -> str:
    return "".join(f"{n}.png{mark}{value}\n" for n, value in enumerate(values))


def test_semicolons_separate_columns_if_nothing_else_does(tmp_path: Path) -> None:
    splits = read(table(tmp_path, "\ufeffimage; label \n" + rows(*['"a, b"', "c;"[:1]] * 4, mark=";")))
    assert splits.class_names == ["a, b", "c"]
    captions = read(table(tmp_path, "image,caption\n" + rows(*["a; b"] * 8)))
    assert captions.captions["train"][0] == ["a; b"]


def test_a_column_of_splits(tmp_path: Path) -> None:
    skipped = SkipList(tmp_path / "skipped.txt")
    lines = rows(*["a,train", "b,TRAIN"] * 2, "a,val", "b,val", "a,Test", "b,test")
    splits = read(table(tmp_path, "image,label,Split\n" + lines), skipped)
    assert sizes(splits) == {"train": 4, "val": 2, "test": 2} and skipped.changes() == {}
    assert [path.name for path in splits.images["test"]] == ["6.png", "7.png"]
    unknown = read(table(tmp_path, "image,label,split\n" + lines.replace("val", "fold 3")), skipped)
    assert sizes(unknown) == {"train": 6, "val": 2}
    assert list(skipped.changes()) == ["the column 'split' was not used: not all its values name splits"]
    assert read(
        table(tmp_path, "image,split\n" + lines.lower().replace("a,", "").replace("b,", "")), label_column="split"
    )
    with pytest.raises(ValueError, match="share 1 image,"):
        read(table(tmp_path, "image,label,split\n" + lines + "./0.png,a,test\n"))


WRONG_TABLES = {
    "two spellings of one image": (
        "image,label\n" + rows(*"abab") + "./0.png,b\n",
        "gives the image 0.png two classes",
    ),
    "one name of two columns": (
        "image,label,label\n" + rows(*["a,b"] * 4),
        "has 2 columns called 'label': rename them",
    ),
    "no suffixes": ("image,label\n0,a\n1,b\n", "no readable images in .*: of 2, for example, .*/0 does not exist"),
    "URLs": ("image,label\nhttps://x.org/0.png,a\n", "no readable images in .*: of 1, for example, .* does not exist"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_tables_that_contradict_themselves(case: str, tmp_path: Path) -> None:
    text, reason = WRONG_TABLES[case]
    with pytest.raises(ValueError, match=reason):
        read(table(tmp_path, text))


def test_missing_labels(tmp_path: Path) -> None:
    skipped = SkipList(tmp_path / "skipped.txt")
    labels = ["3.0", "3", "nan", "NaN", "<NA>", "-1", "", "2", "03", "2.0"]
    splits = read(table(tmp_path, "image,label\n" + rows(*labels), 10), skipped)
    assert splits.class_names == ["2", "3"] and skipped.count() == 5
    mixed = read(table(tmp_path, "image,label\n" + rows("3.0", "3", "x", "3.0", "3", "x")), skipped)
    assert mixed.class_names == ["3", "3.0", "x"] and "the spelling of a number: 3, 3.0" in mixed.notes[0]


def test_captions_as_lists_in_json(tmp_path: Path) -> None:
    lists = "image,caption\n" + rows(*['"[""one"", ""two""]"'] * 4)
    assert read(table(tmp_path, lists)).captions["train"][0] == ["one", "two"]
    words = lists + '4.png,"[sic] a word"\n'
    assert read(table(tmp_path, words)).captions["train"][0] == ['["one", "two"]']


# Names


NAMES: dict[str, Any] = {
    "index.json": {"0": "ant", "1": "bee", "2": "cow"},
    "wordnet.json": {"0": ["a", "ant"], "1": ["b", "bee"], "2": ["c", "cow"]},
    "synonyms.json": {"a": ["ant", "emmet"], "b": ["bee", "drone"], "c": ["cow", "cattle"]},
    "indexed synonyms.json": {"0": ["ant", "emmet"], "1": ["bee"], "2": ["cow"]},
    "semicolons.csv": "a;ant\nb;bee\nc;cow\n",
    "colons.txt": "a: ant\nb: bee\nc: cow\n",
    "semicolons.txt": "c;cow\nb;bee\na;ant\n",
}


@pytest.mark.parametrize("form", NAMES)
def test_names_in_other_forms(form: str, tmp_path: Path) -> None:
    classes(tmp_path, "data", names=("a", "b", "c"))
    content = NAMES[form]
    file = write_text(tmp_path / form, content if isinstance(content, str) else json.dumps(content))
    assert read(tmp_path / "data", class_names=str(file)).class_names == ["ant", "bee", "cow"]


def test_an_index_is_not_taken_for_the_number_of_a_class(tmp_path: Path) -> None:
    classes(tmp_path, "data", names=("x1", "x2", "x10"))
    file = write_text(tmp_path / "x.json", json.dumps({"0": "a", "1": "b", "2": "c"}))
    with pytest.raises(ValueError, match="the order of the classes can be mistaken"):
        read(tmp_path / "data", class_names=str(file))
    classes(tmp_path, "numbers", names=("1", "2", "10"))
    with pytest.raises(ValueError, match="without a name: 10; not among the classes: 0"):
        read(tmp_path / "numbers", class_names=str(file))


def test_oversized_images_are_refused_where_pillow_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (30, 20)).save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(OSError, match="it has 30 x 20 pixels, more than 599"):
        open_picture(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert open_picture(image).size == (30, 20)
    image.close()
