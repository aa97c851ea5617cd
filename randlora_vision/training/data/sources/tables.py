"""Tables of images (.csv and .tsv): their columns and rows."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora_vision.files.text import read_text
from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import clean_label
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import whole_images
from randlora_vision.training.data.skipped import SkipList

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
Row = tuple[str, list[str]]  # its place in messages, and its values


def read_table(path: Path, skipped: SkipList) -> tuple[list[str], list[Row]]:
    """Return the names of the columns and the rows of a table; rows with the wrong number of values are skipped.

    The separator is a tab if the first line contains one, else a comma. Quotes have no meaning between tabs, except
    around a whole value. Between commas they may enclose separators and line breaks; a row of several lines is counted
    in `skipped`, because a stray quote makes one too.

    Raises OSError for anything but a regular file, and ValueError for a file that is not a table of UTF-8 text.
    """
    text = read_text(path)
    tabs = "\t" in text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
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
    return [_unquoted(name) for name in columns] if tabs else columns, rows


def _unquoted(value: str) -> str:
    """Return a value between tabs without the quotes around it, if every quote inside it is doubled."""
    inner = value[1:-1]
    quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else value


def table_part(path: Path, options: SourceOptions, skipped: SkipList) -> Part:
    """Read a table whose first line names the columns; relative paths start from the table's folder.

    An image with several captions takes several lines. Lines with the wrong number of columns and files that cannot
    be read are skipped.

    Raises ValueError when a column is missing, when an image has two classes, and as `read_table` does.
    """
    names, rows = read_table(path, skipped)
    columns = find_columns(names, options, str(path))
    image_at, text_at = names.index(columns.image), names.index(columns.caption or columns.label or "")
    texts: dict[str, list[str]] = {}  # by path as written, in the order of the file
    for place, values in rows:
        if values[image_at].strip():
            texts.setdefault(values[image_at].strip(), []).append(values[text_at])
        else:
            skipped.add(place, "it does not name an image")
    files = {name: path.parent / name for name in texts}
    kept = [name for name, whole in zip(files, whole_images(list(files.values()), skipped), strict=True) if whole]
    images = [files[name] for name in kept]
    if columns.caption:
        return Part(str(path), images, captions=[texts[name] for name in kept])
    for name in kept:
        if len(classes := {label for text in texts[name] if (label := clean_label(text))}) > 1:
            raise ValueError(f"{path} gives the image {name} two classes: {' and '.join(sorted(classes))}")
    return Part(str(path), images, labels=[next(filter(clean_label, texts[name]), texts[name][0]) for name in kept])
