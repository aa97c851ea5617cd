"""Class folders on disk: `root/[train|val|test]/<class>/<image>`, scanned and checked."""

from collections.abc import Callable, Sequence
from pathlib import Path

from randlora_vision.names import listing
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import has_images, image_files, is_image_name, subfolders, whole_images
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.split_names import SPLITS, split_in, split_of


def class_folder_parts(root: Path, options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    """Read the folders of `root` that are its splits, or `root` itself if there are none.

    Raises FileNotFoundError when `root` is not a folder, and ValueError when a split has no images or when it cannot
    be decided whether a folder is a split or a class.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"the image folder {root} does not exist or is not a folder")
    if options.split_folders:
        folders = _chosen(root, options.split_folders)
    else:
        root = _inner(root, skipped)
        folders = _recognised(root, skipped)
        for split, folder in folders.items():
            if folder != root:
                folders[split] = _inner(folder, skipped, split)
    return {split: _read_part(folder, skipped) for split, folder in folders.items()}


def _chosen(root: Path, words: Sequence[str]) -> dict[str, Path]:
    if list(words) == ["none"]:
        return {"train": root}
    folders = {}
    for word in words:
        split, _, folder = word.partition("=")
        if split not in SPLITS or not (root / folder).is_dir() or not folder:
            raise ValueError(
                f"--split-folders {word}: expected none or train=FOLDER val=FOLDER test=FOLDER with folders in {root}: "
                + listing(path.name for path in subfolders(root))
            )
        folders[split] = root / folder
    return folders


def _inner(folder: Path, skipped: SkipList, split: str | None = None) -> Path:
    """Return the only folder in a folder without images of its own, if that has several class folders or splits.

    In the folder of a `split`, it must be named after the split, too. Archives are often unpacked into such folders.
    """
    inside = [path for path in subfolders(folder) if has_images(path)]
    if len(inside) != 1 or len(_classes(inside[0])) < 2:
        return folder
    if any(is_image_name(path.name) for path in folder.iterdir()) or (split and split_in(inside[0].name) != split):
        return folder
    skipped.change(str(folder), "the only folder in it was read in its place")
    return inside[0]


def _recognised(root: Path, skipped: SkipList) -> dict[str, Path]:
    """Return the folders that are splits by their names and because they contain class folders, else `root`.

    A folder called train that contains images itself is a class.
    """
    folders = subfolders(root)
    found = _named(folders, split_of)
    for split, several in _named([folder for folder in folders if not split_of(folder.name)], split_in).items():
        found[split] = found[split] or several
    for split, several in found.items():
        if len(several) > 1:
            raise ValueError(
                f"{listing(folder.name for folder in several)} in {root} may all be the {split} split: "
                f"choose with --split-folders {split}=FOLDER"
            )
    splits = {split: several[0] for split, several in found.items() if several}
    others = [folder for folder in folders if folder not in splits.values() and has_images(folder)] if splits else []
    if "train" not in splits and (others or not splits):
        _refuse_alike(root, folders)
        return {"train": root}
    if list(splits) == ["train"] and any(not _shares(splits["train"], folder) for folder in others):
        raise ValueError(
            f"{root} has {splits['train'].name}/ with folders in it, and {listing(folder.name for folder in others)}: "
            f"are these classes (--split-folders none), or is only the former meant (--split-folders "
            f"train={splits['train'].name})?"
        )
    for folder in others:
        skipped.add(f"the folder {folder}", "it is not one of the splits (--split-folders)")
    return splits


def _named(folders: Sequence[Path], split_named: Callable[[str], str | None]) -> dict[str, list[Path]]:
    return {
        split: [folder for folder in folders if split_named(folder.name) == split and _classes(folder)]
        for split in SPLITS
    }


def _refuse_alike(root: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError when two folders contain several folders of the same names: those may be the classes."""
    seen: dict[str, Path] = {}
    for folder in folders:
        classes = _classes(folder)
        for other in {seen[name] for name in classes if name in seen}:
            if len(shared := sorted(classes & _classes(other))) > 1:
                raise ValueError(
                    f"{other.name} and {folder.name} in {root} both contain {listing(shared)}: are they splits "
                    f"(--split-folders train={other.name} test={folder.name}) or classes (--split-folders none)?"
                )
        seen.update(dict.fromkeys(classes, folder))


def _classes(folder: Path) -> set[str]:
    return {path.name for path in subfolders(folder) if has_images(path)}


def _shares(train: Path, folder: Path) -> bool:
    """Return whether a folder has class folders of the training split, or images without a class."""
    return bool(_classes(train) & _classes(folder)) or split_of(folder.name) is not None


def _read_part(root: Path, skipped: SkipList) -> Part:
    names = [path.name for path in subfolders(root)]
    for path in sorted(root.iterdir()):
        if is_image_name(path.name) and not path.is_dir():
            skipped.add(str(path), "it is in no class folder")
    images, labels = _scan(root, names, skipped)
    if not images:
        raise ValueError(
            f"no readable images in {root}: expected class folders of images, found "
            f"{listing(names) if names else 'no folder'}"
        )
    return Part(str(root), images, labels)


def _scan(root: Path, names: Sequence[str], skipped: SkipList) -> tuple[list[Path], list[str]]:
    """List the readable images of the class folders `names` under `root`, and their classes."""
    found = [(path, name) for name in names for path in image_files(root / name, skipped)]
    whole = whole_images([path for path, _ in found], skipped)
    kept = [item for item, readable in zip(found, whole, strict=True) if readable]
    return [path for path, _ in kept], [name for _, name in kept]
