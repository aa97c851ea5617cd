from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from randlora_vision.training.data.class_names import read_templates, require_words, with_class_names
from randlora_vision.training.data.known_data import known_data
from randlora_vision.training.data.labelled import ImageSplits
from tests.data_helpers import read
from tests.training_helpers import write_class_folders


def splits(names: Sequence[str]) -> ImageSplits:
    images, labels = [Image.new("RGB", (1, 1))] * len(names), range(len(names))
    return ImageSplits(name="x", class_names=names, images={"train": images}, labels={"train": labels}, origin="")


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
    "a number": ("x.json", "3", "an entry must be a list or a JSON object, got a string"),
    "numbers": ("x.json", ["a", "b", 3], r"an entry\[2\] must be a string, got an integer"),
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
    [("a photo\n", "'a photo' has no {}"), ("", "holds no names"), ({"a": "{}"}, "must be a list, got")],
)
def test_wrong_templates(content: Any, message: str, tmp_path: Path) -> None:
    path = words(tmp_path / ("x.json" if isinstance(content, dict) else "x.txt"), content)
    with pytest.raises(ValueError, match=message):
        read_templates([path])
    with pytest.raises(
        ValueError, match="'opanai' has no {} for the class name and is neither a file nor one of openai"
    ):
        read_templates(["opanai"])


# Names by key


KEYED: dict[str, Any] = {
    "x.csv": "folder,name\nsea_lion,seal\ncat,tabby\ndog,terrier\n",
    "x.tsv": "sea_lion\tseal\ncat\ttabby\ndog\tterrier\n",
    "tabs.txt": "dog\tterrier\nsea lion\tseal\ncat\ttabby\n",
    "x.json": {"dog": "terrier", "sea_lion": "seal", "cat": "tabby"},
}


@pytest.mark.parametrize("name", KEYED)
def test_names_by_folder_in_any_order(name: str, tmp_path: Path) -> None:
    found = with_class_names(splits(FOLDERS), words(tmp_path / name, KEYED[name]))
    assert found.class_names == ["tabby", "terrier", "seal"]
    assert found.notes == (f"class names of {tmp_path / name}: cat = tabby, dog = terrier, sea lion = seal",)


def test_names_by_wordnet_id(tmp_path: Path) -> None:
    path = words(tmp_path / "map.txt", "n00000002 great white shark, a fish\nn00000001 tench, Tinca tinca\n")
    names = with_class_names(splits(["n00000001", "n00000002"]), path).class_names
    assert names == ["tench, Tinca tinca", "great white shark, a fish"]


@pytest.mark.parametrize("numbers", [range(12), range(0, 1000, 7)])
@pytest.mark.parametrize("form", ["{}", "{:04}"])
def test_numeric_folders_get_the_names_of_their_numbers(numbers: Any, form: str, tmp_path: Path) -> None:
    """However the folders sort: 10 before 2 as text."""
    for number in numbers:
        (tmp_path / "data" / form.format(number)).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (2, 2), (number % 256, copy, 0)).save(
                tmp_path / "data" / form.format(number) / f"{copy}.png"
            )
    path = words(tmp_path / "names.json", [f"name {number}" for number in range(1000)])
    for source in ("imagenet", path):
        found = read(tmp_path / "data", class_names=source)
        truth = IMAGENET_CLASSNAMES if source == "imagenet" else [f"name {number}" for number in range(1000)]
        for split in found.images:
            for image, label in zip(found.images[split], found.labels[split], strict=True):
                assert found.class_names[label] == truth[int(image.parent.name)]


@pytest.mark.parametrize("own", [["class1", "class10", "class2"], ["Zebra", "ant"]])
def test_a_list_whose_order_can_be_mistaken_is_refused(own: list[str], tmp_path: Path) -> None:
    path = words(tmp_path / "x.txt", "\n".join(f"name {n}" for n in range(len(own))))
    with pytest.raises(ValueError, match="the order of the classes can be mistaken: .* give a name for every class"):
        with_class_names(splits(own), path)
    keyed = words(tmp_path / "x.csv", "\n".join(f"{name},name of {name}" for name in own))
    assert with_class_names(splits(own), keyed).class_names == [f"name of {name}" for name in own]


def test_two_names_for_one_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has two names for 'cat'"):
        with_class_names(splits(FOLDERS), words(tmp_path / "x.csv", "cat,a\ndog,b\ncat,c\nsea_lion,d"))
    same = with_class_names(splits(FOLDERS), words(tmp_path / "y.csv", "cat,a\ndog,a\nsea_lion,d"))
    assert "several classes have the same name" in same.notes[-1]


# Well-known data sets


KNOWN: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "gtsrb": (
        "torchvision:GTSRB",
        ["0", "1", "14"],
        ["red and white circle 20 kph speed limit", "red and white circle 30 kph speed limit", "stop"],
    ),
    "gtsrb folders": ("data/GTSRB", ["00000", "00014"], ["red and white circle 20 kph speed limit", "stop"]),
    "eurosat": ("hf:tanganke/eurosat", ["AnnualCrop", "SeaLake"], ["annual crop land", "lake or sea"]),
    "country211": ("torchvision:Country211@test", ["AD", "XK", "ZW"], ["Andorra", "Kosovo", "Zimbabwe"]),
    "caltech101": (
        "torchvision:Caltech101",
        ["Faces", "yin yang", "ant"],
        ["off-center face", "yin and yang symbol", "ant"],
    ),
    "caltech256": ("torchvision:Caltech256", ["001.ak47", "145.motorbikes-101"], ["ak47", "motorbikes"]),
    "cub": ("data/CUB_200_2011", ["001.Black footed Albatross"], ["Black footed Albatross"]),
    "ucf101": ("data/ucf101.csv", ["ApplyEyeMakeup", "TaiChi"], ["Apply Eye Makeup", "Tai Chi"]),
    "sun397": ("torchvision:SUN397", ["apartment building/outdoor"], ["apartment building outdoor"]),
    "mnist": ("torchvision:MNIST", ["3 - three"], ["3"]),
    "svhn": ("torchvision:SVHN", ["0", "9"], ["0", "9"]),
    "flowers": ("timm:torch/flowers102", ["0", "101"], ["pink primrose", "blackberry lily"]),
}


@pytest.mark.parametrize("case", KNOWN)
def test_words_of_well_known_data(case: str) -> None:
    data, own, truth = KNOWN[case]
    found = with_class_names(splits(own), None, data)
    assert found.class_names == truth
    require_words(found, data)
    known = known_data(data)
    assert known is not None and all("{}" in template for template in known.templates) and known.templates


def test_all_data_sets_of_the_paper_are_known() -> None:
    names = ["stanford_cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN", "CIFAR10", "CIFAR100"]
    names += [
        "imagenet-1k",
        "STL10",
        "Food101",
        "Caltech256",
        "FGVCAircraft",
        "Flowers102",
        "OxfordIIITPet",
        "CUB-200-2011",
    ]
    names += ["PascalVOC", "Country211", "Caltech101", "UCF101"]
    assert len(names) == 22 and all(known_data(f"hf:someone/{name}") for name in names)
    assert known_data("data/my-birds") is None and known_data(None) is None


def test_classes_without_words_are_refused_for_prompts() -> None:
    for own in (["0", "1", "2"], ["n01440764", "n01443537"], ["1990", "1991"]):
        with pytest.raises(ValueError, match="the classes of x have no names for prompts, only .*--class-names FILE"):
            require_words(splits(own), "data/x")
    require_words(splits(["7", "cat"]), "data/x")


def test_torchvision_keeps_some_names_elsewhere() -> None:
    from randlora_vision.training.data.sources.torchvision import class_names_of

    class Caltech:
        categories = ["ant", "anchor"]

    assert class_names_of(Caltech()) == ["ant", "anchor"] and class_names_of(object()) is None
