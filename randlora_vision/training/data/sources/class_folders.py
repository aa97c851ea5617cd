"""Class folders on disk: `root/[train|val|test]/<class>/<image>`, scanned and checked."""

from collections.abc import Sequence
from pathlib import Path

from randlora_vision.names import listing
from randlora_vision.training.data.pictures import SkipList, image_suffixes, whole_images
from randlora_vision.training.data.splits import Part

_VALIDATION_NAMES = ("val", "valid", "validation")


def class_folder_parts(root: Path, skipped: SkipList) -> dict[str, Part]:
    """Read `root/train` with val/ and test/ next to it, or only `root` if there is no train/.

    If only one of val/ and test/ exists, both splits use its images. Raises FileNotFoundError when `root` is
    not a folder, and ValueError when a split has no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"the image folder {root} does not exist or is not a folder")
    train = root / "train" if (root / "train").is_dir() else root
    folders = {"train": train, **(_held_out(root) if train != root else {})}
    parts = {split: _read_part(folder, skipped) for split, folder in folders.items()}
    for missing, other in (("val", "test"), ("test", "val")):
        if other in parts:
            parts.setdefault(missing, parts[other])
    return parts


def _held_out(root: Path) -> dict[str, Path]:
    validation = next((root / name for name in _VALIDATION_NAMES if (root / name).is_dir()), None)
    found = {"val": validation, "test": root / "test" if (root / "test").is_dir() else None}
    return {split: folder for split, folder in found.items() if folder}


def _read_part(root: Path, skipped: SkipList) -> Part:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    images, labels = _scan(root, names, skipped)
    if not images:
        raise ValueError(
            f"no readable images in {root}: expected class folders of images, found "
            f"{listing(names) if names else 'no folder'}"
        )
    return Part(str(root), images, labels)


def _scan(root: Path, names: Sequence[str], skipped: SkipList) -> tuple[list[Path], list[str]]:
    """List the readable images of the class folders `names` under `root`, and their classes."""
    found = [
        (path, name)
        for name in names
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in image_suffixes() and path.is_file()
    ]
    whole = whole_images([path for path, _ in found], skipped)
    kept = [item for item, readable in zip(found, whole, strict=True) if readable]
    return [path for path, _ in kept], [name for _, name in kept]
