"""Tables of images (.csv and .tsv): their columns and rows."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora_vision.files.text import read_text
from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import clean_label
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import whole_images
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.split_names import split_of

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
    """Return the columns that the options name, or well-known ones; raise ValueError, listing all, without one."""
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


_SPLIT_COLUMNS = ("split", "subset", "partition")
TABLE_SUFFIXES = (".csv", ".tsv")
Row = tuple[str, list[str]]  # its place in messages, and its values


def read_table(path: Path, skipped: SkipList) -> tuple[list[str], list[Row]]:
    """Return the names of the columns and the rows of a table; rows with the wrong number of values are skipped.

    The separator is the first of tab, comma and semicolon that the first line contains. Quotes have no meaning between
    tabs, except around a whole value. Otherwise they may enclose separators and line breaks; a row of several lines is
    counted in `skipped`, because a stray quote makes one too.

    Raises OSError for anything but a regular file, and ValueError for a file that is not a table of UTF-8 text.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    first = text.partition("\n")[0]
    separator = next((mark for mark in "\t,;" if mark in first), ",")
    tabs = separator == "\t"
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    rows: list[Row] = []
    end = 0
    try:
        columns = next(reader, [])
        end = reader.line_num
        for values in reader:
            place, lines, end = f"{path}:{reader.line_num}", reader.line_num - end, reader.line_num
            if not values:
                continue
            if lines > 1:
                skipped.change(place, "a quoted value of several lines was read")
            if len(values) != len(columns):
                skipped.add(
                    place, "it does not have as many columns as the first line (quote values with a separator in them)"
                )
            else:
                rows.append((place, [_unquoted(value) for value in values] if tabs else values))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not a readable row (is a quote missing?): {error}") from error
    return [(_unquoted(name) if tabs else name).strip() for name in columns], rows


def _unquoted(value: str) -> str:
    """Return a value between tabs without the quotes around it, if every quote inside it is doubled."""
    inner = value[1:-1]
    quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else value


def table_parts(path: Path, options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    """Read a table whose first line names the columns; relative paths start from the table's folder.

    An image with several captions takes several lines, or one with a list of strings in JSON (in all lines). Lines with
    the wrong number of columns and files that cannot be read are skipped. A column called split, subset or partition
    that names the split of every line gives these splits.

    Raises ValueError when a column is missing or is there twice, when an image has two classes, when none of the
    images can be read, and as `read_table` does.
    """
    names, rows = read_table(path, skipped)
    columns = find_columns(names, options, str(path))
    for name in (columns.image, columns.caption, columns.label):
        if name is not None and names.count(name) > 1:
            raise ValueError(f"{path} has {names.count(name)} columns called {name!r}: rename them")
    groups = _split_rows(path, names, rows, columns, skipped)
    several = len(groups) > 1
    return {
        split: _table_part(path, f"{path} ({split})" if several else str(path), names, group, columns, skipped)
        for split, group in groups.items()
    }


def _split_rows(
    path: Path, names: Sequence[str], rows: Sequence[Row], columns: Columns, skipped: SkipList
) -> dict[str, list[Row]]:
    at = next((at for at, name in enumerate(names) if name.lower() in _SPLIT_COLUMNS and name != columns.label), None)
    if at is None or not rows:
        return {"train": list(rows)}
    groups: dict[str | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(split_of(row[1][at]), []).append(row)
    if None in groups or "train" not in groups:
        skipped.change(str(path), f"the column {names[at]!r} was not used: not all its values name splits")
        return {"train": list(rows)}
    return groups  # type: ignore[return-value]  # without None


def _table_part(
    path: Path, source: str, names: Sequence[str], rows: Sequence[Row], columns: Columns, skipped: SkipList
) -> Part:
    image_at, text_at = names.index(columns.image), names.index(columns.caption or columns.label or "")
    texts: dict[str, list[str]] = {}  # by path, in the order of the file
    for place, values in rows:
        if values[image_at].strip():
            texts.setdefault(os.path.normpath(values[image_at].strip()), []).append(values[text_at])
        else:
            skipped.add(place, "it does not name an image")
    files = {name: path.parent / name for name in texts}
    kept = [name for name, whole in zip(files, whole_images(list(files.values()), skipped), strict=True) if whole]
    if files and not kept:
        first = next(iter(files.values()))
        why = "cannot be read" if first.exists() else "does not exist"
        raise ValueError(f"no readable images in {source}: of {len(files)}, for example, {first} {why}")
    images = [files[name] for name in kept]
    if columns.caption:
        return Part(source, images, captions=_spelled_out([texts[name] for name in kept]))
    for name in kept:
        if len(classes := {label for text in texts[name] if (label := clean_label(text))}) > 1:
            raise ValueError(f"{path} gives the image {name} two classes: {' and '.join(sorted(classes))}")
    return Part(source, images, labels=[next(filter(clean_label, texts[name]), texts[name][0]) for name in kept])


def _spelled_out(captions: list[list[str]]) -> list[list[str]]:
    """Return the captions; those that are all lists of strings in JSON, as some tables have them, as several ones."""
    if not all(text.lstrip().startswith("[") for texts in captions for text in texts):
        return captions
    try:
        lists = [[check_type(parse_json(text, "it"), list[str], "it") for text in texts] for texts in captions]
    except ValueError:
        return captions
    return [[text for some in of_image for text in some] for of_image in lists]
