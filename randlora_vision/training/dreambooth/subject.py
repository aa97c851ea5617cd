"""The images of a subject with their captions, and the class images for prior preservation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import printable
from randlora_vision.training.data.pictures import Picture, StoredImage
from randlora_vision.training.dreambooth.batches import Item, read_picture
from randlora_vision.training.dreambooth.buckets import Size, nearest_bucket
from randlora_vision.training.dreambooth.options import SubjectOptions

_METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "prompt")  # keys in metadata.jsonl; the first one found in a line is used


@dataclass(frozen=True)
class Subject:
    """Images, each with a caption."""

    name: str
    images: Sequence[Picture]
    captions: Sequence[str]

    def record(self) -> dict[str, Any]:
        """Return the record for the run folder: the files and their captions."""
        return {
            "name": self.name,
            "images": [str(image) if isinstance(image, Path) else number for number, image in enumerate(self.images)],
            "captions": list(self.captions),
        }

    def __str__(self) -> str:
        captions = len(set(self.captions))
        return f"{len(self.images)} of {self.name}, " + (f"{captions} captions" if captions > 1 else self.captions[0])


def read_subject(options: SubjectOptions) -> Subject:
    """Read the folder or the dataset; raise ValueError if there are no images, or an image has no caption."""
    if options.dataset_name:
        return _read_dataset(options)
    assert options.instance_data_dir is not None
    folder = Path(options.instance_data_dir)
    images = list_images(folder, "--instance-data-dir")
    if not images:
        raise ValueError(f"--instance-data-dir {folder} contains no images")
    listed = _read_metadata(folder)
    captions = []
    for image in images:
        beside = image.with_suffix(".txt")
        caption = listed.pop(image.name, None)
        if beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip()
        caption = caption or options.instance_prompt
        if not caption:
            raise ValueError(f"{image} has no caption: give --instance-prompt, or write {beside.name} next to it")
        captions.append(caption)
    if listed:
        raise ValueError(f"{folder / _METADATA} names {sorted(listed)[0]}, which is not an image in the folder")
    return Subject(folder.name, images, captions)


def list_images(folder: Path, flag: str) -> list[Path]:
    """Return the image files of a folder, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} does not exist or is not a folder")
    formats = Image.registered_extensions()
    extensions = {extension for extension, name in formats.items() if name in Image.OPEN}
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in extensions and path.is_file())


def _read_metadata(folder: Path) -> dict[str, str]:
    path = folder / _METADATA
    captions: dict[str, str] = {}
    if not path.is_file():
        return captions
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = check_type(parse_json(line, "it"), dict, "it")
            key = next((key for key in _CAPTION_KEYS if key in values), _CAPTION_KEYS[0])
            found = check_object(values, {"file_name": str, key: str}, "it")
            captions[found["file_name"]] = found[key].strip()
        except ValueError as error:
            expected = f'{{"file_name": "1.png", "{_CAPTION_KEYS[0]}": "a photo of ..."}}'
            found_line = printable(line.strip(), 80)
            raise ValueError(f"{path}, line {number}: expected {expected}, found {found_line} ({error})") from None
    return captions


def _read_dataset(options: SubjectOptions) -> Subject:
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = options.dataset_name
    assert name is not None
    try:
        found = load_from_disk(name) if _is_saved_dataset(Path(name)) else load_dataset(name)
    except Exception as error:  # datasets raises many types
        raise ValueError(f"--dataset-name {name} cannot be read: {type(error).__name__}: {error}") from error
    data = (found.get("train") or next(iter(found.values()))) if isinstance(found, DatasetDict) else found
    for flag, column in (("--image-column", options.image_column), ("--caption-column", options.caption_column)):
        if column is not None and column not in data.column_names:
            raise ValueError(
                f"{flag} {column}: there is no such column, {name} has the columns {', '.join(data.column_names)}"
            )
    if len(data) == 0:
        raise ValueError(f"--dataset-name {name} has no images")
    column = options.caption_column
    captions = [str(caption) for caption in data[column]] if column else [options.instance_prompt or ""] * len(data)
    images = _Column(data, options.image_column)
    return Subject(name, [StoredImage(images, index) for index in range(len(data))], captions)


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


@dataclass(frozen=True)
class _Column:
    """One column of a dataset, for `StoredImage`."""

    data: Any
    name: str

    def __getitem__(self, index: int) -> tuple[Any]:
        return (self.data[index][self.name],)


def make_items(
    subject: Subject, class_images: Sequence[Picture], class_prompt: str | None, buckets: Sequence[Size]
) -> tuple[list[Item], list[str]]:
    """Return the training items and the list of prompts that their captions index.

    The items of the subject come first, each in its nearest bucket, then those of the class. Class images are assigned
    to the used buckets in turn, so that every used bucket gets some; if there are too few, they are reused.
    """
    prompts = list(dict.fromkeys([*subject.captions, *([class_prompt] if class_prompt else [])]))
    items = []
    for image, caption in zip(subject.images, subject.captions, strict=True):
        picture = read_picture(image)
        bucket = nearest_bucket((picture.height, picture.width), buckets)
        items.append(Item(image, prompts.index(caption), bucket, prior=False))
    used = [item.bucket for item in items]
    if class_images:
        assert class_prompt is not None
        place = prompts.index(class_prompt)
        for number in range(max(len(class_images), len(used))):
            image, bucket = class_images[number % len(class_images)], used[number % len(used)]
            items.append(Item(image, place, bucket, prior=True))
    return items, prompts
