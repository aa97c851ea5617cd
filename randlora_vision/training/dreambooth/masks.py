"""Images that belong to those of a subject by their names: masks, and the images that an edit begins with.

A mask is white where the error counts, or where an inpainting pipeline makes the image anew.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.data.sources.caption_folder import list_images
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.given import alike
from randlora_vision.training.dreambooth.options import SubjectOptions


def read_masks(images: Sequence[Picture], options: SubjectOptions) -> list[Image.Image] | None:
    """Return the masks of images (mode L), or None if the options ask for none.

    Raises ValueError for an image without a mask, a mask of other proportions, and if no image is transparent.
    """
    if options.mask_data_dir is not None:
        paths = _beside(images, Path(options.mask_data_dir), "--mask-data-dir", "mask")
        for path, image in zip(paths, images, strict=True):
            require_alike(path, image)
        return [read_picture(path).convert("L") for path in paths]
    if options.alpha_mask:
        masks = [_alpha(image) for image in images]
        if all(mask.getextrema() == (255, 255) for mask in masks):
            raise ValueError("--alpha-mask: no image has a transparent pixel")
        return masks
    return None


def read_originals(images: Sequence[Picture], options: SubjectOptions) -> list[tuple[Picture, ...]] | None:
    """Return the images of each --cond-data-dir that are edited into those of the subject, or None.

    Raises ValueError for an image without an original.
    """
    if not options.cond_data_dir:
        return None
    found = [_beside(images, Path(folder), "--cond-data-dir", "image to edit") for folder in options.cond_data_dir]
    return list(zip(*found, strict=True))


def require_alike(other: Picture, image: Picture) -> None:
    """Raise ValueError if an image that belongs to another one has other proportions."""
    (width, height), (of_image, high) = read_picture(other).size, read_picture(image).size
    if not alike((width, height), (of_image, high)):
        raise ValueError(f"{other} has {width} x {height} pixels, but {image} has {of_image} x {high}")


def _beside(images: Sequence[Picture], folder: Path, flag: str, what: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder} does not exist or is not a folder")
    files = {path.stem: path for path in list_images(folder)}
    return [_of_file(image, files, f"{flag} {folder} has no {what}") for image in images]


def _of_file(image: Picture, files: dict[str, Path], missing: str) -> Path:
    assert isinstance(image, Path)
    if image.stem not in files:
        raise ValueError(f"{missing} for {image.name}: expected {image.stem}.png")
    return files[image.stem]


def _alpha(image: Picture) -> Image.Image:
    """Return how opaque an image is: composed on white and on black, only what is transparent differs."""
    on_white, on_black = (read_picture(image, (grey, grey, grey)) for grey in (255, 0))
    return ImageChops.invert(ImageChops.difference(on_white, on_black)).getchannel("R")
