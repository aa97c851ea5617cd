"""The images of a subject with their captions, and the class images for prior preservation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from randlora_vision.files.text import as_utf8
from randlora_vision.names import printable
from randlora_vision.training.data.cleaning import clean_caption
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.pictures import Picture, readable
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import caption_folder
from randlora_vision.training.data.sources.caption_folder import read_captions
from randlora_vision.training.data.sources.hugging_face import is_saved_dataset, stored_images
from randlora_vision.training.dreambooth.batches import Item, read_picture
from randlora_vision.training.dreambooth.buckets import Size, nearest_bucket
from randlora_vision.training.dreambooth.captions import variants_of, with_trigger
from randlora_vision.training.dreambooth.masks import read_masks
from randlora_vision.training.dreambooth.options import SubjectOptions


@dataclass(frozen=True)
class Subject:
    """Images, each with a caption."""

    name: str
    images: Sequence[Picture]
    captions: Sequence[str]
    masks: Sequence[Image.Image] | None = None
    """Where the errors count in each image, mode L."""

    def record(self) -> dict[str, Any]:
        """Return the record for the run folder: the files and their captions."""
        return {
            "name": self.name,
            "images": [
                as_utf8(image) if isinstance(image, Path) else number for number, image in enumerate(self.images)
            ],
            "captions": list(self.captions),
        }

    def __str__(self) -> str:
        captions = len(set(self.captions))
        return f"{len(self.images)} of {self.name}, " + (f"{captions} captions" if captions > 1 else self.captions[0])


def read_subject(options: SubjectOptions, skipped: SkipList) -> Subject:
    """Read the images with captions, unreadable ones into `skipped`; raise ValueError for none or no caption."""
    name, found = _read_dataset(options) if options.dataset_name else _read_folder(options, skipped)
    if not found:
        raise ValueError(f"{name} contains no images")
    background = parse_colour(options.background)
    kept = [(image, caption) for image, caption in found if readable(image, skipped, background) is not None]
    if not kept:
        read_picture(found[0][0])  # raises with the reason
    found = kept
    captions = [caption or options.instance_prompt or "" for _, caption in found]
    if "" in captions:
        image = found[captions.index("")][0]
        beside = f", or write {image.with_suffix('.txt').name} next to it" if isinstance(image, Path) else ""
        raise ValueError(f"{image} has no caption: give --instance-prompt{beside}")
    images, captions = [image for image, _ in found], [with_trigger(text, options.trigger_word) for text in captions]
    return Subject(name, images, captions, read_masks(images, options))


def _read_folder(options: SubjectOptions, skipped: SkipList) -> tuple[str, list[tuple[Picture, str | None]]]:
    assert options.instance_data_dir is not None
    folder = Path(options.instance_data_dir)
    list_images(folder, "--instance-data-dir")  # raises if it is not a folder
    return printable(as_utf8(folder.name)), [*read_captions(folder, skipped)]


def list_images(folder: Path, flag: str) -> list[Path]:
    """Return the image files of a folder, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} does not exist or is not a folder")
    return caption_folder.list_images(folder)


def _read_dataset(options: SubjectOptions) -> tuple[str, list[tuple[Picture, str | None]]]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = options.dataset_name
    assert name is not None
    try:
        found = load_from_disk(name) if is_saved_dataset(Path(name)) else load_dataset(name)
    except Exception as error:  # datasets raises many types
        raise ValueError(f"--dataset-name {name} cannot be read: {type(error).__name__}: {error}") from error
    data = (found.get("train") or next(iter(found.values()))) if isinstance(found, DatasetDict) else found
    for flag, column in (("--image-column", options.image_column), ("--caption-column", options.caption_column)):
        if column is not None and column not in data.column_names:
            raise ValueError(
                f"{flag} {column}: there is no such column, {name} has the columns {', '.join(data.column_names)}"
            )
    column = options.caption_column
    captions = [clean_caption(caption) for caption in data[column]] if column else [""] * len(data)
    return name, list(zip(stored_images(data, options.image_column), captions, strict=True))


def make_items(
    subject: Subject,
    class_images: Sequence[tuple[Picture, str]],
    buckets: Sequence[Size],
    options: SubjectOptions,
    seed: int,
) -> tuple[list[Item], list[str]]:
    """Return the training items and the list of prompts that their captions index.

    The items of the subject come first, each in its nearest bucket, then those of the class. Class images, each with
    its caption, are assigned to the used buckets in turn, so that every used bucket gets some; if there are too few,
    they are reused.
    """
    prompts = list(dict.fromkeys([*subject.captions, *(caption for _, caption in class_images)]))
    variants = {caption: variants_of(caption, options, seed, prompts) for caption in dict.fromkeys(subject.captions)}
    background = parse_colour(options.background)
    masks: Sequence[Image.Image | None] = subject.masks or [None] * len(subject.images)
    items = []
    for image, caption, mask in zip(subject.images, subject.captions, masks, strict=True):
        picture = read_picture(image, background)
        bucket = nearest_bucket((picture.height, picture.width), buckets)
        items.append(Item(image, prompts.index(caption), bucket, False, background, variants[caption], mask))
    used = [item.bucket for item in items]
    for number in range(max(len(class_images), len(used)) if class_images else 0):
        (image, caption), bucket = class_images[number % len(class_images)], used[number % len(used)]
        items.append(Item(image, prompts.index(caption), bucket, True, background))
    return items, prompts
