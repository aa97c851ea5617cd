"""CSV and TSV files of image paths and captions or classes."""

import csv
from collections.abc import Iterator
from pathlib import Path

from randlora_vision.training.columns import Columns, find_columns
from randlora_vision.training.data_options import SourceOptions
from randlora_vision.training.image_files import whole_images
from randlora_vision.training.images import SkipList
from randlora_vision.training.splits import Part

TABLE_SUFFIXES = (".csv", ".tsv")


def table_part(path: Path, options: SourceOptions, skipped: SkipList) -> Part:
    """Read a table with a line of column names; relative paths start from its folder.

    Columns are separated by tabs where there is one in the first line, else by commas. Several captions of one
    image are several lines. Lines that do not fit the first one and files that cannot be read are skipped.

    Raises ValueError when a column is missing or the file is no UTF-8 text.
    """
    texts: dict[str, list[str]] = {}  # by path as written; the order is that of the file
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",", strict=True)
            columns = find_columns(reader.fieldnames or [], options, str(path))
            for image, text in _rows(reader, columns, path, skipped):
                texts.setdefault(image, []).append(text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no readable table of UTF-8 text: {error}") from error
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
            skipped.add(place, "it has not as many columns as the first line (quote what holds the separator)")
        elif not image:
            skipped.add(place, "it names no image")
        else:
            yield image, text


def plain_labels(labels: list[str]) -> list[int] | list[str]:
    """Return labels as numbers where all of them are."""
    if all(label.isdecimal() for label in labels):
        return [int(label) for label in labels]
    return labels
