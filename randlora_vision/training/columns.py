"""Which columns of a table are the images, and the captions or the classes."""

from collections.abc import Sequence
from dataclasses import dataclass

from randlora_vision.training.data_options import SourceOptions
from randlora_vision.training.splits import listing

# In order of preference: the names in use by open_clip, diffusers and Hugging Face's datasets.
IMAGES = ("image", "img", "filepath", "file_name", "filename", "image_path", "path", "file")
CAPTIONS = ("caption", "captions", "text", "title")
LABELS = ("label", "labels", "class", "class_name", "target", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The names of the columns; of the last two one is given."""

    image: str
    caption: str | None
    label: str | None


def find_columns(columns: Sequence[str], options: SourceOptions, source: str) -> Columns:
    """Return the columns that the options name, or else those with well-known names, captions before labels.

    Raises ValueError, with the columns that there are, when one is missing.
    """
    image = _find(columns, options.image_column, "--image-column", IMAGES, source)
    label = None if options.caption_column else _given(columns, options.label_column, "--label-column", source)
    caption = None if label else _given(columns, options.caption_column, "--caption-column", source)
    if label is None and caption is None:
        known = [name for name in (*CAPTIONS, *LABELS) if name in columns and name != image]
        if not known:
            raise ValueError(
                f"{source} has no column that is known to hold captions or classes: name it with --caption-column "
                f"or --label-column; it has {listing(columns, most=20)}"
            )
        caption, label = (known[0], None) if known[0] in CAPTIONS else (None, known[0])
    return Columns(image, caption, label)


def _find(columns: Sequence[str], given: str | None, flag: str, known: Sequence[str], source: str) -> str:
    found = _given(columns, given, flag, source) or next((name for name in known if name in columns), None)
    if found is None:
        raise ValueError(
            f"{source} has no column that is known to hold images: name it with {flag}; "
            f"it has {listing(columns, most=20)}"
        )
    return found


def _given(columns: Sequence[str], given: str | None, flag: str, source: str) -> str | None:
    if given is not None and given not in columns:
        raise ValueError(f"{source} has no column {given!r} ({flag}); it has {listing(columns, most=20)}")
    return given
