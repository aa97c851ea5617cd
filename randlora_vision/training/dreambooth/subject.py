"""The images of a subject with their captions, and the class images for prior preservation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from randlora_vision.errors import failures
from randlora_vision.files.text import as_utf8
from randlora_vision.names import printable
from randlora_vision.training.data.cleaning import clean_caption
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.pictures import Picture, is_image_name, readable
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import caption_folder
from randlora_vision.training.data.sources.caption_folder import read_captions
from randlora_vision.training.data.sources.hugging_face import is_saved_dataset, stored_images
from randlora_vision.training.data.video import Clip, is_video_name
from randlora_vision.training.dreambooth.batches import Item, read_picture
from randlora_vision.training.dreambooth.buckets import Size, nearest_bucket
from randlora_vision.training.dreambooth.captions import variants_of, with_trigger
from randlora_vision.training.dreambooth.families import Seen, Takes
from randlora_vision.training.dreambooth.masks import read_masks, read_originals, require_alike
from randlora_vision.training.dreambooth.options import SubjectOptions


@dataclass(frozen=True)
class Subject:
    """Images, each with a caption."""

    name: str
    images: Sequence[Picture]
    captions: Sequence[str]
    masks: Sequence[Image.Image] | None = None
    """Where the errors count in each image, or where an inpainting pipeline makes it anew; mode L."""
    originals: Sequence[Sequence[Picture]] | None = None
    """The images that an editing pipeline makes into each of these."""

    def record(self) -> dict[str, Any]:
        """Return the record for the run folder: the files and their captions."""
        return {
            "name": self.name,
            "images": [
                as_utf8(image) if isinstance(image, Path | Clip) else number for number, image in enumerate(self.images)
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
        raise ValueError(f"{name} contains no images" + _videos_in(options))
    background = parse_colour(options.background)
    kept = [entry for entry in found if readable(_glimpse(entry[0]), skipped, background) is not None]
    if not kept:
        read_picture(_glimpse(found[0][0]))  # raises with the reason
    found = kept
    captions = [caption or options.instance_prompt or "" for _, caption, _ in found]
    if "" in captions:
        image = found[captions.index("")][0]
        beside = f", or write {image.with_suffix('.txt').name} next to it" if isinstance(image, Path) else ""
        raise ValueError(f"{image} has no caption: give --instance-prompt{beside}")
    images = [image for image, _, _ in found]
    captions = [with_trigger(text, options.trigger_word) for text in captions]
    originals: Sequence[Sequence[Picture]] | None = read_originals(images, options)
    if options.cond_image_column:
        originals = [given for _, _, given in found]
    return Subject(name, images, captions, read_masks(images, options), originals)


_Found = tuple[Picture, str | None, Sequence[Picture]]  # an image, its caption, and the images that are edited into it


def _read_folder(options: SubjectOptions, skipped: SkipList) -> tuple[str, list[_Found]]:
    assert options.instance_data_dir is not None
    folder = Path(options.instance_data_dir)
    list_images(folder, "--instance-data-dir")  # raises if it is not a folder
    found = read_captions(folder, skipped, lambda name: is_image_name(name) or is_video_name(name))
    items: list[_Found] = []
    for path, caption in found:
        if not is_video_name(path.name):
            items.append((path, caption, ()))
        elif options.num_frames > 1:
            items.append((Clip(path, options.num_frames), caption, ()))
        else:
            skipped.add(path, "it is a video: --num-frames trains pipelines of videos on clips")
    return printable(as_utf8(folder.name)), items


def _glimpse(image: Picture) -> Picture:
    """Return what shows whether an image can be read: whether a clip is long enough depends on the pipeline's rate."""
    return replace(image, frames=1) if isinstance(image, Clip) else image


def _videos_in(options: SubjectOptions) -> str:
    folder = options.instance_data_dir
    if folder is None or not caption_folder.list_images(Path(folder), is_video_name):
        return ""
    return ": its videos are for pipelines of videos, with --num-frames"


def require_given(subject: Subject, takes: Takes, pipeline: str, options: SubjectOptions) -> None:
    """Raise ValueError if a pipeline of this name needs images to edit that the options do not name, or the reverse."""
    edits = takes in ("image", "images")
    if edits and subject.originals is None:
        raise ValueError(f"a {pipeline} edits images: give --cond-data-dir, with the image to edit for each image")
    if not edits and subject.originals is not None:
        raise ValueError(f"--cond-data-dir and --cond-image-column are for editing, but {pipeline} edits no images")
    if takes == "image":
        for given, image in zip(subject.originals or (), subject.images, strict=True):
            if len(given) > 1:
                raise ValueError(f"a {pipeline} edits one image: give one --cond-data-dir or --cond-image-column")
            require_alike(given[0], image)
    if edits and options.with_prior_preservation:
        raise ValueError(f"--with-prior-preservation: class images are made from text, but a {pipeline} edits images")


def list_images(folder: Path, flag: str) -> list[Path]:
    """Return the image files of a folder, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} does not exist or is not a folder")
    return caption_folder.list_images(folder)


def _read_dataset(options: SubjectOptions) -> tuple[str, list[_Found]]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = options.dataset_name
    assert name is not None
    with failures(f"--dataset-name {name} cannot be read"):
        found = load_from_disk(name) if is_saved_dataset(Path(name)) else load_dataset(name)
    data = (found.get("train") or next(iter(found.values()))) if isinstance(found, DatasetDict) else found
    columns = [("--image-column", options.image_column), ("--caption-column", options.caption_column)]
    for flag, column in (*columns, *(("--cond-image-column", name) for name in options.cond_image_column)):
        if column is not None and column not in data.column_names:
            raise ValueError(
                f"{flag} {column}: there is no such column, {name} has the columns {', '.join(data.column_names)}"
            )
    column = options.caption_column
    captions = [clean_caption(caption) for caption in data[column]] if column else [""] * len(data)
    given = [stored_images(data, name) for name in options.cond_image_column]
    originals = list(zip(*given, strict=True)) if given else [()] * len(data)
    return name, list(zip(stored_images(data, options.image_column), captions, originals, strict=True))


def make_items(
    subject: Subject,
    class_images: Sequence[tuple[Picture, str]],
    buckets: Sequence[Size],
    options: SubjectOptions,
    seed: int,
    takes: Takes = None,
    sees: bool = False,
) -> tuple[list[Item], list[str]]:
    """Return the training items and the list of prompts that their captions index.

    The items of the subject come first, each in its nearest bucket, then those of the class. Class images, each with
    its caption, are assigned to the used buckets in turn, so that every used bucket gets some; if there are too few,
    they are reused.
    """
    background = parse_colour(options.background)
    captions = subject.captions
    if sees:
        assert subject.originals is not None
        pairs = zip(captions, subject.originals, strict=True)
        captions = [Seen(caption, [read_picture(image, background) for image in given]) for caption, given in pairs]
    prompts = list(dict.fromkeys([*captions, *(caption for _, caption in class_images)]))
    variants = {caption: variants_of(caption, options, seed, prompts) for caption in dict.fromkeys(captions)}
    none: Sequence[None] = [None] * len(subject.images)
    masks: Sequence[Image.Image | None] = subject.masks or none
    given: Sequence[Sequence[Picture]] = subject.originals or [()] * len(subject.images)
    if takes == "mask":  # those of the subject say what is made anew, and the error counts everywhere
        masks, given = none, [() if mask is None else (mask,) for mask in masks]
    items = []
    for image, caption, mask, beside in zip(subject.images, captions, masks, given, strict=True):
        picture = read_picture(image, background)
        bucket = nearest_bucket((picture.height, picture.width), buckets)
        items.append(Item(image, prompts.index(caption), bucket, False, background, variants[caption], mask, beside))
    used = [item.bucket for item in items]
    for number in range(max(len(class_images), len(used)) if class_images else 0):
        (image, caption), bucket = class_images[number % len(class_images)], used[number % len(used)]
        items.append(Item(image, prompts.index(caption), bucket, True, background))
    return items, prompts
