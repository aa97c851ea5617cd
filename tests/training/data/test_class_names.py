from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from randlora_vision.training.data.class_names import read_templates, with_class_names
from randlora_vision.training.data.labelled import ImageSplits
from tests.data_helpers import read
from tests.training_helpers import write_class_folders


def splits(names: Sequence[str]) -> ImageSplits:
    images, labels = [Image.new("RGB", (1, 1))] * len(names), range(len(names))
    return ImageSplits("x", names, {"train": images}, {"train": labels}, "")


def words(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content) if path.suffix == ".json" else content)
    return str(path)


FOLDERS = ["cat", "dog", "sea lion"]  # cat/, dog/, sea_lion/


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "tabby\n\n terrier \nseal\n"),
        ("x.json", ["tabby", "terrier", "seal"]),
        ("x.json", {"sea_lion": "seal", "cat": "tabby", "dog": "terrier"}),
        ("x.json", {"sea lion": "seal", "cat": "tabby", "dog": "terrier"}),
    ],
)
def test_names_of_a_file(name: str, content: Any, tmp_path: Path) -> None:
    assert with_class_names(splits(FOLDERS), words(tmp_path / name, content)).class_names == [
        "tabby",
        "terrier",
        "seal",
    ]


def test_without_a_file_the_names_stay() -> None:
    assert with_class_names(splits(FOLDERS), None).class_names == FOLDERS


def test_some_names_may_be_the_folders_own(tmp_path: Path) -> None:
    path = words(tmp_path / "x.txt", "cat\ndog\nseal")
    assert with_class_names(splits(FOLDERS), path).class_names == ["cat", "dog", "seal"]


BAD: dict[str, tuple[str, Any, str]] = {
    "other keys": (
        "x.json",
        {"cat": "a", "dgo": "b", "sea_lion": "c"},
        "without a name: dog; not among the classes: dgo",
    ),
    "a key too few": ("x.json", {"cat": "a", "dog": "b"}, r"\(2 names, 3 classes\); without a name: sea lion"),
    "a name too few": ("x.txt", "cat\nsea_lion", r"\(2 names, 3 classes\); without a name: dog"),
    "a name too many": ("x.txt", "cat\ndog\nsea lion\nwhale", "not among the classes: whale"),
    "another order": (
        "x.txt",
        "dog\ncat\nsea lion",
        "not in the order of the labels: it has 'dog' where the data has 'cat'",
    ),
    "empty": ("x.txt", "\n", "holds no names"),
    "no JSON": ("x.json", None, "is not valid JSON"),
    "a number": ("x.json", "3", "holds no names"),
    "numbers": ("x.json", ["a", "b", 3], "holds 3, which is not a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_names_that_do_not_match(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    if content is None:
        (tmp_path / name).write_text("{")
    else:
        words(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        with_class_names(splits(FOLDERS), str(tmp_path / name))


def test_a_missing_file() -> None:
    with pytest.raises(ValueError, match="--class-names: there is no file nowhere.txt"):
        with_class_names(splits(FOLDERS), "nowhere.txt")


def test_names_of_numbers(tmp_path: Path) -> None:
    """Names are found by number: the data may lack classes, but a number without a name is refused."""
    path = words(tmp_path / "x.txt", "a\nb\nc")
    for numbers in (["0", "1"], ["0", "2"], ["0", "1", "2"], ["00", "02"]):
        expected = ["abc"[int(number)] for number in numbers]
        assert with_class_names(splits(numbers), path).class_names == expected
    assert with_class_names(splits(["1", "2", "3"]), path).class_names == ["a", "b", "c"]  # counted from 1
    with pytest.raises(ValueError, match="has 3 names, but the labels go up to 3"):
        with_class_names(splits(["0", "1", "2", "3"]), path)


def test_imagenet() -> None:
    folders = [f"n{number:08}" for number in range(1000)]
    assert with_class_names(splits(folders), None).class_names == list(IMAGENET_CLASSNAMES)
    assert with_class_names(splits([str(n) for n in range(1000)]), "imagenet").class_names == list(IMAGENET_CLASSNAMES)
    assert with_class_names(splits(folders[:10]), None).class_names == folders[:10]
    with pytest.raises(ValueError, match="--class-names imagenet does not match the data"):
        with_class_names(splits(folders[:10]), "imagenet")


def test_the_reader_names_the_folders(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "data")
    path = words(tmp_path / "names.json", {"zero": "nought", "one": "ace", "two": "deuce"})
    assert read(root, class_names=path).class_names == ["ace", "deuce", "nought"]


def test_templates(tmp_path: Path) -> None:
    openai, simple = read_templates(["openai"]), read_templates(["simple"])
    assert openai == tuple(function("{}") for function in OPENAI_IMAGENET_TEMPLATES) and len(openai) == 80
    assert len(simple) == 7 and simple[0] == "itap of a {}."
    lines = words(tmp_path / "x.txt", "a {}\n\nthe {}\n")
    array = words(tmp_path / "x.json", ["one {}"])
    assert read_templates(["no {}", lines, array]) == ("no {}", "a {}", "the {}", "one {}")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a photo\n", "'a photo' has no {}"), ("", "holds no names"), ({"a": "{}"}, "holds no names")],
)
def test_wrong_templates(content: Any, message: str, tmp_path: Path) -> None:
    path = words(tmp_path / ("x.json" if isinstance(content, dict) else "x.txt"), content)
    with pytest.raises(ValueError, match=message):
        read_templates([path])
    with pytest.raises(
        ValueError, match="'opanai' has no {} for the class name and is neither a file nor one of openai"
    ):
        read_templates(["opanai"])
