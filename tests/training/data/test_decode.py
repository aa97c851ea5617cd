"""The decoder, against closed forms of pixels and Pillow's own operations."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.data.batches import evaluation_batches, training_batches
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.labelled import LabelledImages
from randlora_vision.training.data.options import DataOptions
from randlora_vision.training.data.pictures import open_picture, readable
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.subject import read_subject
from tests.data_helpers import read, some_digits, write_images, write_shard, write_table

RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # of brightness
GREY = np.rint(RAMP * 255).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def rgba(alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([COLOUR, alpha]))


def composed(alpha: np.ndarray, background: Sequence[int] = (255, 255, 255)) -> np.ndarray:
    a = alpha[..., None] / 255
    return np.rint(COLOUR * a + np.array(background) * (1 - a))


def palette() -> Image.Image:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    image.putpalette([value for i in range(64) for value in (i * 4, 255 - i * 4, 7)])
    return image


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]


INDEX = np.arange(64).reshape(8, 8)
HALF = np.where(INDEX % 2, 255, 0).astype(np.uint8)
CMYK = np.stack([GREY, GREY[::-1], GREY.T, GREY // 3], axis=2)
CASES: dict[str, tuple[Callable[[Path], Path], np.ndarray]] = {
    "rgb": (lambda p: saved(Image.fromarray(COLOUR), p / "x.png"), COLOUR),
    "grey": (lambda p: saved(Image.fromarray(GREY), p / "x.png"), three(GREY)),
    "one bit": (lambda p: saved(Image.fromarray(HALF).convert("1"), p / "x.png"), three(HALF)),
    "16-bit png": (
        lambda p: saved(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), p / "x.png"),
        three(RAMP * 255),
    ),
    "16-bit tiff": (
        lambda p: saved(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), p / "x.tiff"),
        three(RAMP * 255),
    ),
    "dark 16-bit": (
        lambda p: saved(Image.fromarray(np.rint(RAMP * 255).astype(np.uint16)), p / "x.png"),
        three(RAMP),
    ),
    "16-bit pgm": (
        lambda p: (
            (p / "x.pgm").write_bytes(b"P5 8 8 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes()) and p / "x.pgm"
        ),
        three(RAMP * 255),
    ),
    "float": (lambda p: saved(Image.fromarray(RAMP.astype(np.float32)), p / "x.tiff"), three(RAMP * 255)),
    "float of 255": (
        lambda p: saved(Image.fromarray((RAMP * 255).astype(np.float32)), p / "x.tiff"),
        three(RAMP * 255),
    ),
    "float of any range": (
        lambda p: saved(Image.fromarray((RAMP * 9 - 3).astype(np.float32)), p / "x.tiff"),
        three(RAMP * 255),
    ),
    "32-bit": (
        lambda p: saved(Image.fromarray(np.rint(RAMP * 10**6).astype(np.int32)), p / "x.tiff"),
        three(RAMP * 255),
    ),
    "cmyk": (
        lambda p: saved(Image.fromarray(CMYK, "CMYK"), p / "x.tiff"),
        (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:]) / 255,
    ),
    "palette": (
        lambda p: saved(palette(), p / "x.png"),
        np.stack([INDEX * 4, 255 - INDEX * 4, np.full_like(INDEX, 7)], axis=2),
    ),
    "palette with transparency": (
        lambda p: saved(palette(), p / "x.png", transparency=bytes([0, 128] + [255] * 62)),
        np.concatenate(
            [[[255, 255, 255], [(4 + 255) / 2, 253, (7 + 255) / 2]], [[4 * i, 255 - 4 * i, 7] for i in range(2, 64)]]
        ).reshape(8, 8, 3),
    ),
    "alpha": (lambda p: saved(rgba(GREY), p / "x.png"), composed(GREY)),
    "opaque alpha": (lambda p: saved(rgba(np.full_like(GREY, 255)), p / "x.png"), COLOUR),
    "grey with alpha": (
        lambda p: saved(Image.fromarray(np.dstack([GREY, HALF]), "LA"), p / "x.png"),
        three(np.where(HALF, GREY, 255)),
    ),
    "transparent colour": (
        lambda p: saved(Image.fromarray(COLOUR), p / "x.png", transparency=tuple(COLOUR[2, 3].tolist())),
        np.where((COLOUR == COLOUR[2, 3]).all(axis=2, keepdims=True), 255, COLOUR),
    ),
    "animated gif": (
        lambda p: saved(frames()[0], p / "x.gif", save_all=True, append_images=frames()[1:]),
        np.full((8, 8, 3), (255, 0, 0)),
    ),
    "animated png": (
        lambda p: saved(frames()[0], p / "x.png", save_all=True, append_images=frames()[1:]),
        np.full((8, 8, 3), (255, 0, 0)),
    ),
    "pages": (
        lambda p: saved(frames()[0], p / "x.tiff", save_all=True, append_images=frames()[1:]),
        np.full((8, 8, 3), (255, 0, 0)),
    ),
}
CHANGED = {  # what is recorded for the cases that are not used as they are
    "16-bit": "16-bit values",
    "dark": "16-bit values",
    "float": "float values",
    "32-bit": "32-bit values",
    "cmyk": "from CMYK",
    "palette": "palette|transparent",
    "alpha": "transparent",
    "grey with": "transparent",
    "transparent": "transparent",
    "animated png": "first frame",
    "animated gif": "first frame",
    "pages": "first frame",
}


@pytest.mark.parametrize("case", CASES)
def test_pixels(case: str, tmp_path: Path) -> None:
    write, truth = CASES[case]
    path = write(tmp_path)
    skipped = SkipList(tmp_path / "skipped.txt")
    image = readable(path, skipped)
    assert image is not None and image.mode == "RGB"
    assert np.abs(np.asarray(image) - truth).max() <= 1
    if case in ("rgb", "grey", "one bit", "opaque alpha", "palette"):
        assert (np.asarray(image) == truth).all()
    rules = [rule for start, rule in CHANGED.items() if case.startswith(start)]
    changes = {
        rule: count for rule, count in skipped.changes().items() if case != "animated gif" or "palette" not in rule
    }
    assert len(changes) == len(rules)
    if rules:
        assert any(word in next(iter(changes)) for word in rules[0].split("|"))
        assert list(changes.values()) == [1] and str(path) in (tmp_path / "changed.txt").read_text()


@pytest.mark.parametrize("colour", ["black", "#ff8000"])
def test_the_background_is_chosen(colour: str, tmp_path: Path) -> None:
    path = saved(rgba(GREY), tmp_path / "x.png")
    found = np.asarray(open_picture(path, parse_colour(colour)))
    assert np.abs(found - composed(GREY, {"black": (0, 0, 0), "#ff8000": (255, 128, 0)}[colour])).max() <= 1
    with pytest.raises(ValueError, match="--background must be a colour such as white"):
        DataOptions(background="whyte")


def file_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sources(folder: Path, content: bytes) -> dict[str, Any]:
    """Write the same image, and three plain ones, as every kind of data."""
    plain = [image for image, _ in some_digits(3, (0,))]
    names = write_images(folder / "flat", plain)
    (folder / "flat" / "x.png").write_bytes(content)
    rows = [{"image": f"flat/{name}", "text": name} for name in (*names, "x.png")]
    members = [
        (Path(name).stem, {"png": (folder / "flat" / name).read_bytes(), "txt": name}) for name in (*names, "x.png")
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    every = [{"image": {"bytes": (folder / "flat" / row["text"]).read_bytes()}, "text": row["text"]} for row in rows]
    datasets.Dataset.from_list(every, features).save_to_disk(folder / "saved")
    for row in rows:
        (folder / "flat" / row["text"]).with_suffix(".txt").write_text(row["text"])
    return {
        "table": write_table(folder / "x.csv", rows),
        "shard": write_shard(folder / "x.tar", members),
        "dataset": folder / "saved",
        "folder": folder / "flat",
    }


@pytest.mark.parametrize("kind", ["16-bit", "alpha", "turned"])
def test_every_source_has_the_same_decoder(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content, truth = {
        "16-bit": (file_bytes(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG"), three(RAMP * 255)),
        "alpha": (file_bytes(rgba(HALF), "PNG"), composed(HALF, (0, 0, 255))),
        "turned": (file_bytes(Image.fromarray(COLOUR[:4]), "PNG", exif=exif), np.rot90(COLOUR[:4], -1)),
    }[kind]
    for name, source in sources(tmp_path, content).items():
        skipped = SkipList(tmp_path / f"{name}.txt")
        splits = read(source, skipped, background="blue")
        found = []
        for split in splits.images:
            data = splits.select(split, to_tensor, lambda texts: np.zeros(1), skipped)
            found += [data.picture(i) for i in range(len(data)) if "x.png" in data.captions[i]]
        (image,) = found
        assert np.abs(np.asarray(image) - truth).max() <= 1, name
        assert sum(skipped.changes().values()) == 1, name
        for changed in tmp_path.glob("changed.txt"):
            changed.unlink()
    subject = read_subject(SubjectOptions(instance_data_dir=str(tmp_path / "flat")), SkipList())
    image = read_picture(subject.images[subject.captions.index("x.png")], (0, 0, 255))
    assert np.abs(np.asarray(image) - truth).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(COLOUR[:4]), tmp_path / f"x.{kind}", format=kind, exif=exif)
    with Image.open(path) as opened:
        truth = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(truth))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_matter(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOUR), tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_picture(path).size == (8, 8)


def test_what_cannot_be_decoded_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = RAMP.astype(np.float32)
    bad[0, 0] = np.nan
    path = saved(Image.fromarray(bad), tmp_path / "x.tiff")
    with pytest.raises(OSError, match="not finite"):
        open_picture(path)
    large = saved(Image.new("L", (100, 100)), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(OSError, match="10000 pixels"):
        open_picture(large)


# Unreadable images among readable ones


def broken_later(folder: Path, numbers: Sequence[int], count: int = 6) -> list[Path]:
    """Write images, some of which are whole files that break when they are decoded."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(saved(Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)), folder / f"{number}.png"))
        if number in numbers:
            content = bytearray(paths[-1].read_bytes())
            content[60:70] = bytes(10)
            paths[-1].write_bytes(content)
    return paths


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_filled_from_what_can_be_read(workers: int, tmp_path: Path) -> None:
    paths = broken_later(tmp_path, (1, 2, 5))
    skipped = SkipList(tmp_path / "skipped.txt")
    data = LabelledImages(paths, range(6), to_tensor, skipped)
    batches = list(training_batches(data, batch_size=1, batches=12, seed=0, workers=workers))
    order = [
        index
        for batch in training_batches(LabelledImages(paths[:1] * 6, range(6), to_tensor, skipped), 1, 12, 0, 0)
        for index in batch["labels"].tolist()
    ]
    instead = {1: 3, 2: 3, 5: 0}  # the next one that can be read, with its own label
    assert [batch["labels"].tolist() for batch in batches] == [[instead.get(index, index)] for index in order]
    for batch in batches:
        (label,) = batch["labels"].tolist()
        assert np.array_equal(
            batch["images"][0].permute(1, 2, 0).mul(255).round().numpy(), np.asarray(Image.open(paths[label]))
        )
    assert skipped.count() == 3


@pytest.mark.parametrize("numbers", [(1,), (0, 1), (0, 1, 2, 3), (4, 5)])
def test_evaluation_measures_what_can_be_read(numbers: Sequence[int], tmp_path: Path) -> None:
    """Also where all images of a batch of two are unreadable."""
    import torch

    from randlora_vision.training.evaluation.accuracy import measure

    paths = broken_later(tmp_path, numbers)
    data = LabelledImages(paths, [0, 1, 2, 0, 1, 2], to_tensor, SkipList())
    kept = [number for number in range(6) if number not in numbers]
    scores = measure(
        lambda images: torch.eye(3)[[0] * len(images)], evaluation_batches(data, 2, 0), 3, torch.device("cpu")
    )
    assert scores.values["samples"] == len(kept) == int(scores.confusion.sum())
    assert scores.values["top1"] == sum(number % 3 == 0 for number in kept) / len(kept)
    losses = [float(np.log(np.e + 2)) - (number % 3 == 0) for number in kept]
    assert scores.loss == pytest.approx(np.mean(losses))


def test_nothing_can_be_read(tmp_path: Path) -> None:
    data = LabelledImages(broken_later(tmp_path, range(3), 3), range(3), to_tensor, SkipList())
    for batches in (evaluation_batches(data, 2, 0), training_batches(data, 2, 1, 0, 0)):
        with pytest.raises(ValueError, match="none of 3 images can be read: see skipped.txt"):
            next(iter(batches))
