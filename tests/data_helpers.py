"""Small real data in every form that train_clip.py reads: the same digits as tables, shards and datasets."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits


def some_digits(per_class: int = 4, classes: Sequence[int] = (0, 1, 2)) -> list[tuple[Image.Image, str]]:
    """Return real digits, `per_class` of each, class after class, with their names."""
    splits = digits.read_digits(classes)
    chosen: list[tuple[Image.Image, str]] = []
    for label, name in enumerate(splits.class_names):
        of_class = [i for i, other in enumerate(splits.labels["train"]) if other == label][:per_class]
        chosen += [(splits.images["train"][i], name) for i in of_class]  # type: ignore[misc]
    return chosen


def png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path, images: Iterable[Image.Image]) -> list[str]:
    """Write `folder`/000.png, 001.png... and return the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, image in enumerate(images):
        names.append(f"{number:03}.png")
        image.save(folder / names[-1])
    return names


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], delimiter: str = ",") -> Path:
    """Write a table; the first row's keys are the columns."""
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes | str | dict[str, Any]]]]) -> Path:
    """Write a .tar of samples: a key, and the content of its member of each extension."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                if isinstance(content, dict):
                    content = json.dumps(content)
                data = content.encode() if isinstance(content, str) else content
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def read(data: object, skipped: SkipList | None = None, **options: Any) -> Any:
    """Read data as train_clip.py does."""
    from randlora_vision.training.data.read import read_data

    images = ImageOptions(data=str(data), **options)
    return read_data(images, skipped or SkipList(), images.class_names)


def pixels(picture: Any) -> bytes:
    """Return the pixels of a picture, however it is kept."""
    from randlora_vision.training.data.pictures import open_picture

    return np.asarray(open_picture(picture)).tobytes()


def contents(splits: Any, split: str) -> list[tuple[bytes, Any]]:
    """Return what a split holds, sorted: the pixels of every image with its class name or captions."""
    if hasattr(splits, "captions"):
        words = [tuple(texts) for texts in splits.captions[split]]
    else:
        words = [splits.class_names[label] for label in splits.labels[split]]
    return sorted((pixels(image), word) for image, word in zip(splits.images[split], words, strict=True))


def listed(path: Path) -> dict[str, str]:
    """Return the lines of skipped.txt: what was skipped, by the end of its name, and why."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {Path(what).name: why for what, why in lines}


def write_text(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# The same twelve digits in every form


DIGITS = some_digits()  # four each of zero, one, two


def caption(name: str) -> str:
    return f"the digit {name}"


def table(folder: Path, column: str = "caption", suffix: str = ".csv", **more: Any) -> Path:
    names = write_images(folder / "images", [image for image, _ in DIGITS])
    words = [caption(name) if column == "caption" else name for _, name in DIGITS]
    rows = [{"filepath": f"images/{file}", column: word} for file, word in zip(names, words, strict=True)]
    return write_table(folder / f"data{suffix}", rows, "\t" if suffix == ".tsv" else ",")


def shards(folder: Path, kind: str = "txt", count: int = 3) -> str:
    """Write the digits to `count` shards, in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[tuple[str, dict[str, Any]]] = []
    for number, (image, name) in enumerate(DIGITS):
        about: dict[str, Any] = {
            "txt": {"txt": caption(name)},
            "json": {"json": {"caption": caption(name), "width": 32}},
            "cls": {"cls": f"{('zero', 'one', 'two').index(name)}\n"},
            "key": {"json": {"kind": name}, "txt": "not asked for"},
        }[kind]
        samples.append((f"part/{number:04}", {"png": png(image), **about}))
    for shard in range(count):
        write_shard(folder / f"train-{shard:02}.tar", samples[shard::count])
    return str(folder / f"train-{{00..{count - 1:02}}}.tar")


def hf(folder: Path, column: str = "caption") -> datasets.Dataset:
    kind = datasets.Value("string") if column == "caption" else datasets.ClassLabel(names=["zero", "one", "two"])
    return datasets.Dataset.from_list(
        [
            {"number": n, "picture": {"bytes": png(image)}, column: caption(name) if column == "caption" else name}
            for n, (image, name) in enumerate(DIGITS)
        ],
        datasets.Features({"number": datasets.Value("int64"), "picture": datasets.Image(), column: kind}),
    )


def saved(folder: Path, column: str = "caption") -> Path:
    hf(folder, column).save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(folder: Path, column: str = "caption") -> str:
    (folder / "hub").mkdir()
    hf(folder, column).to_parquet(folder / "hub" / "train.parquet")
    return f"hf:{folder / 'hub'}"


def mnist(folder: Path) -> str:
    """Write the digits as torchvision's MNIST, 28 pixels and all ten."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, chosen in (("train", some_digits(6, range(10))), ("t10k", some_digits(2, range(10)))):
        images = np.stack([np.asarray(image.convert("L").resize((28, 28))) for image, _ in chosen])
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            np.array([0x803, len(images), 28, 28], ">i4").tobytes() + images.tobytes()
        )
        labels = np.repeat(np.arange(10, dtype=np.uint8), len(chosen) // 10)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(labels)], ">i4").tobytes() + labels.tobytes()
        )
    return "torchvision:MNIST"
