"""Tables of images (.csv and .tsv): their columns and rows."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora_vision.names import listing
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.pictures import SkipList, whole_images
from randlora_vision.training.data.splits import Part

# In order of preference: the names used by open_clip, diffusers and Hugging Face's datasets.
IMAGES = ("image", "img", "filepath", "file_name", "filename", "image_path", "path", "file")
CAPTIONS = ("caption", "captions", "text", "title")
LABELS = ("label", "labels", "class", "class_name", "target", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The names of the columns; exactly one of `caption` and `label` is given."""

    image: str
    caption: str | None
    label: str | None


def find_columns(columns: Sequence[str], options: SourceOptions, source: str) -> Columns:
    """Return the columns that the options name, or else those with well-known names, captions before labels.

    Raises ValueError, listing the existing columns, when one is missing.
    """
    image = _find(columns, options.image_column, "--image-column", IMAGES, source)
    label = None if options.caption_column else _given(columns, options.label_column, "--label-column", source)
    caption = None if label else _given(columns, options.caption_column, "--caption-column", source)
    if label is None and caption is None:
        known = [name for name in (*CAPTIONS, *LABELS) if name in columns and name != image]
        if not known:
            raise ValueError(
                f"{source} has no column with a known name for captions or classes: name it with --caption-column "
                f"or --label-column; it has {listing(columns, most=20)}"
            )
        caption, label = (known[0], None) if known[0] in CAPTIONS else (None, known[0])
    return Columns(image, caption, label)


def _find(columns: Sequence[str], given: str | None, flag: str, known: Sequence[str], source: str) -> str:
    found = _given(columns, given, flag, source) or next((name for name in known if name in columns), None)
    if found is None:
        raise ValueError(
            f"{source} has no column with a known name for images: name it with {flag}; "
            f"it has {listing(columns, most=20)}"
        )
    return found


def _given(columns: Sequence[str], given: str | None, flag: str, source: str) -> str | None:
    if given is not None and given not in columns:
        raise ValueError(f"{source} has no column {given!r} ({flag}); it has {listing(columns, most=20)}")
    return given


TABLE_SUFFIXES = (".csv", ".tsv")


def table_part(path: Path, options: SourceOptions, skipped: SkipList) -> Part:
    """Read a table whose first line names the columns; relative paths start from the table's folder.

    The separator is a tab if the first line contains one, else a comma. An image with several captions takes
    several lines. Lines with the wrong number of columns and files that cannot be read are skipped.

    Raises ValueError when a column is missing or the file is not UTF-8 text.
    """
    texts: dict[str, list[str]] = {}  # by path as written, in the order of the file
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",", strict=True)
            columns = find_columns(reader.fieldnames or [], options, str(path))
            for image, text in _rows(reader, columns, path, skipped):
                texts.setdefault(image, []).append(text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable table of UTF-8 text: {error}") from error
    names = list(texts)
    files = [path.parent / name for name in names]
    kept = [i for i, whole in enumerate(whole_images(files, skipped)) if whole]
    images = [files[i] for i in kept]
    if columns.caption:
        return Part(str(path), images, captions=[texts[names[i]] for i in kept])
    for i in kept:
        if len(set(texts[names[i]])) > 1:
            raise ValueError(
                f"{path} gives the image {names[i]} two classes: {' and '.join(sorted(set(texts[names[i]])))}"
            )
    return Part(str(path), images, labels=plain_labels([texts[names[i]][0] for i in kept]))


def _rows(reader: "csv.DictReader[str]", columns: Columns, path: Path, skipped: SkipList) -> Iterator[tuple[str, str]]:
    for row in reader:
        place = f"{path}:{reader.line_num}"
        image, text = row[columns.image], row[columns.caption or columns.label or ""]
        if None in row or None in row.values():
            skipped.add(
                place, "it does not have as many columns as the first line (quote values with a separator in them)"
            )
        elif not image:
            skipped.add(place, "it does not name an image")
        else:
            yield image, text


def plain_labels(labels: list[str]) -> list[int] | list[str]:
    """Return the labels as integers if all of them are decimal numbers, else unchanged."""
    if all(label.isdecimal() for label in labels):
        return [int(label) for label in labels]
    return labels
