"""A folder of images with their captions: in text files beside them, or in a metadata file."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from randlora_vision.files.text import read_text
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import printable
from randlora_vision.training.data.cleaning import clean_caption
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import has_images, is_hidden, is_image_name, subfolders, whole_images
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tables import IMAGES, read_table
from randlora_vision.training.data.split_names import split_of

_METADATA = ("metadata.jsonl", "metadata.csv")
_SIDECARS = (".txt", ".caption")  # the first that exists is used
_CAPTION_KEYS = ("text", "caption", "prompt")  # the first one that an entry has is used


def caption_folders(folder: Path) -> dict[str, Path]:
    """Return the folder itself as `train`, or its splits, if they contain images with captions; else nothing."""
    if is_caption_folder(folder):
        return {"train": folder}
    inside = [path for path in subfolders(folder) if has_images(path)] if folder.is_dir() else []
    splits = {split: path for path in inside if (split := split_of(path.name)) and is_caption_folder(path)}
    return splits if "train" in splits and len(splits) == len(inside) else {}


def is_caption_folder(folder: Path) -> bool:
    """Return whether a folder contains images and captions for them, rather than class folders."""
    if not folder.is_dir() or any(has_images(path) for path in subfolders(folder)):
        return False
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return any(map(is_image_name, names)) and any(_is_sidecar(name) or name in _METADATA for name in names)


def _is_sidecar(name: str) -> bool:
    return Path(name).suffix.lower() in _SIDECARS and not is_hidden(name)


def list_images(folder: Path, is_item: Callable[[str], bool] = is_image_name) -> list[Path]:
    """Return the image files in a folder itself, sorted by name, without hidden ones.

    Links to nothing and what is not a regular file are among them: they are recorded when they are read.
    """
    return sorted(path for path in folder.iterdir() if is_item(path.name) and not path.is_dir())


def read_captions(
    folder: Path, skipped: SkipList, is_item: Callable[[str], bool] = is_image_name
) -> list[tuple[Path, str | None]]:
    """Return the images of a folder, and those that its metadata names, with their captions; None for none.

    An image with several captions in the metadata comes as often.

    `is_item` says of a file name whether it is that of an image, or of whatever else has captions.

    A text file beside an image (1.txt or 1.caption for 1.jpg; 1.jpg.txt) takes precedence over the metadata. Captions
    without an image are recorded in `skipped`.

    Raises ValueError for a file that is not UTF-8 text and for a malformed metadata file.
    """
    images = list_images(folder, is_item)
    files = sorted(path for path in folder.iterdir() if _is_sidecar(path.name) and not path.is_dir())
    for path in files:
        if not path.is_file():
            skipped.add(str(path), "it is not a regular file")
    beside = {(path.stem, path.suffix.lower()): path for path in files if path.is_file()}
    listed: dict[Path, list[str | None]] = {}
    for place, name, caption in _metadata(folder):
        image = folder / name
        if os.path.isfile(image):  # unlike Path's, it returns False for a name that is too long
            # An empty cell is not a caption, but an empty text file is one.
            listed.setdefault(image, []).append(caption or None)
        else:
            skipped.add(place, f"there is no image {name} for its caption")
    names = {image: [(stem, suffix) for suffix in _SIDECARS for stem in (image.stem, image.name)] for image in images}
    for key in sorted(set(beside) - {key for keys in names.values() for key in keys}):
        skipped.add(str(beside[key]), "there is no image of its name for its caption")
    found: list[tuple[Path, str | None]] = []
    for image in (*images, *(image for image in listed if image not in names)):
        own = next((beside[key] for key in names.get(image, ()) if key in beside), None)
        texts = [read_text(own)] if own else dict.fromkeys(listed.get(image, [None]))
        found += [(image, None if text is None else clean_caption(text)) for text in texts]
    return found


def caption_folder_part(folder: Path, skipped: SkipList) -> Part:
    """Read a folder of images with captions; raises as `read_captions` does."""
    captions: dict[Path, list[str | None]] = {}
    for image, caption in read_captions(folder, skipped):
        captions.setdefault(image, []).append(caption)
    whole = whole_images(list(captions), skipped)
    kept = [image for image, readable in zip(captions, whole, strict=True) if readable]
    return Part(str(folder), kept, captions=[captions[image] for image in kept])


def _metadata(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the file name and the caption of every entry of the metadata file."""
    lines, table = (folder / name for name in _METADATA)
    if lines.exists():
        yield from _json_lines(lines)
    if table.exists():
        columns, rows = read_table(table, SkipList(strict=True))
        image, text = (next((name for name in names if name in columns), None) for names in (IMAGES, _CAPTION_KEYS))
        if image is None or text is None:
            raise ValueError(
                f"{table}: expected the columns file_name and {_CAPTION_KEYS[0]}, found {', '.join(columns)}"
            )
        image_at, text_at = columns.index(image), columns.index(text)
        yield from ((place, values[image_at], values[text_at]) for place, values in rows)


def _json_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = check_type(parse_json(line, "it"), dict, "it")
            key = next((key for key in _CAPTION_KEYS if key in values), _CAPTION_KEYS[0])
            entry = check_object(values, {"file_name": str, key: str | None}, "it")
            if key not in values:
                raise ValueError(f"it lacks {key}")
        except ValueError as error:
            expected = f'{{"file_name": "1.png", "{_CAPTION_KEYS[0]}": "a photo of ..."}}'
            found = printable(line.strip(), 80)
            raise ValueError(f"{path}, line {number}: expected {expected}, found {found} ({error})") from None
        yield f"{path}:{number}", entry["file_name"], entry[key] or ""
