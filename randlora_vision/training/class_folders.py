"""Class folders on disk: `root/[train|val|test]/<class>/<image>`, scanned, checked and split."""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from randlora_vision.training.images import ImageSplits, SkipList, read_image

_Image = TypeVar("_Image")

_VALIDATION_NAMES = ("val", "valid", "validation")
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def read_class_folders(root: Path, val_fraction: float, split_seed: int, skipped: SkipList) -> ImageSplits:
    """Read `root` as class folders, with the splits that it has or else one made by chance.

    With a train/ folder, val/ and test/ beside it are used as they are; where both are missing, and
    where `root` holds the class folders itself, `val_fraction` of every class is held out, drawn
    with `split_seed`.

    Raises ValueError when there are no images, fewer than two classes, or a split has a class that
    train/ lacks.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"the image folder {root} does not exist or is no folder")
    train = root / "train" if (root / "train").is_dir() else root
    names = sorted(folder.name for folder in _folders(train))
    images, labels = {}, {}
    images["train"], labels["train"] = _scan(train, names, skipped)
    if not images["train"]:
        raise ValueError(
            f"no readable images in {train}: expected class folders of images, found "
            f"{_listing(names) if names else 'no folder'}"
        )
    present = sorted(set(labels["train"]))
    if len(present) < 2:
        raise ValueError(
            f"only one class with images in {train} ({names[present[0]]!r}): classification needs two or more"
        )
    names = _drop_empty(names, labels, present)
    held_out = _held_out(root) if train != root else {}
    for split, folder in held_out.items():
        unknown = {path.name for path in _folders(folder)} - set(names)
        if unknown:
            raise ValueError(f"{folder} has classes that {train} lacks: {_listing(sorted(unknown))}")
        images[split], labels[split] = _scan(folder, names, skipped)
        if not images[split]:
            raise ValueError(f"no readable images in {folder}")
    if not held_out:
        images, labels = hold_out(images["train"], labels["train"], names, val_fraction, split_seed)
    for missing, other in (("val", "test"), ("test", "val")):
        if missing not in images:
            images[missing], labels[missing] = images[other], labels[other]
    origin = f"folders {sorted(held_out)}" if held_out else f"fraction {val_fraction}, seed {split_seed}"
    return ImageSplits(root.name, [name.replace("_", " ") for name in names], images, labels, origin)


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _held_out(root: Path) -> dict[str, Path]:
    validation = next((root / name for name in _VALIDATION_NAMES if (root / name).is_dir()), None)
    found = {"val": validation, "test": root / "test" if (root / "test").is_dir() else None}
    return {split: folder for split, folder in found.items() if folder}


def _drop_empty(names: Sequence[str], labels: Mapping[str, list[int]], present: Sequence[int]) -> list[str]:
    """Leave out the class folders without an image, renumbering the labels in place."""
    number = {old: new for new, old in enumerate(present)}
    labels["train"][:] = [number[label] for label in labels["train"]]
    return [names[old] for old in present]


def _scan(root: Path, names: Sequence[str], skipped: SkipList) -> tuple[list[Path], list[int]]:
    """List the images of the class folders `names` under `root`, broken ones left out."""
    formats = Image.registered_extensions()
    extensions = {extension for extension, name in formats.items() if name in Image.OPEN}
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in extensions and path.is_file()
    ]
    with ThreadPoolExecutor(8) as pool:
        readable = pool.map(lambda item: _is_whole(item[0], skipped), found)
        kept = [item for item, whole in zip(found, readable, strict=True) if whole]
    return [path for path, _ in kept], [label for _, label in kept]


def _is_whole(path: Path, skipped: SkipList) -> bool:
    """Tell whether an image file is readable to its end, without decoding it where its format allows."""
    try:
        with Image.open(path) as image:
            marker = _END_MARKERS.get(image.format or "")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64))
            if not marker or marker not in file.read():
                read_image(path)  # cut short, or followed by other bytes, or of another format: find out
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        skipped.add(path, error)
        return False
    return True


def hold_out(
    images: Sequence[_Image], labels: Sequence[int], names: Sequence[str], fraction: float, seed: int
) -> tuple[dict[str, list[_Image]], dict[str, list[int]]]:
    """Hold out `fraction` of every class, at least one image of it, and leave at least one."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    generator = random.Random(seed)
    chosen: set[int] = set()
    for label, indices in sorted(members.items()):
        if len(indices) < 2:
            raise ValueError(
                f"the class {names[label]!r} has one image: it cannot be in training and in validation; "
                "add images, or give a val/ folder"
            )
        count = min(len(indices) - 1, max(1, round(fraction * len(indices))))
        chosen.update(generator.sample(indices, count))
    split = {"train": [i for i in range(len(labels)) if i not in chosen], "val": sorted(chosen)}
    return (
        {name: [images[i] for i in indices] for name, indices in split.items()},
        {name: [labels[i] for i in indices] for name, indices in split.items()},
    )


def _listing(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
