"""Masks of the loss: for each image of a subject, where its error counts (white) and where it does not (black)."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.data.sources.caption_folder import list_images
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.options import SubjectOptions

_ALIKE = 0.02  # how far the proportions of a mask may be from those of its image: rounding of a smaller mask


def read_masks(images: Sequence[Picture], options: SubjectOptions) -> list[Image.Image] | None:
    """Return the masks of images (mode L), or None if the options ask for none.

    Raises ValueError for an image without a mask, a mask of other proportions, and if no image is transparent.
    """
    if options.mask_data_dir is not None:
        folder = Path(options.mask_data_dir)
        if not folder.is_dir():
            raise ValueError(f"--mask-data-dir {folder} does not exist or is not a folder")
        files = {path.stem: path for path in list_images(folder)}
        return [_of_file(image, files, folder) for image in images]
    if options.alpha_mask:
        masks = [_alpha(image) for image in images]
        if all(mask.getextrema() == (255, 255) for mask in masks):
            raise ValueError("--alpha-mask: no image has a transparent pixel")
        return masks
    return None


def _of_file(image: Picture, files: dict[str, Path], folder: Path) -> Image.Image:
    assert isinstance(image, Path)
    if image.stem not in files:
        raise ValueError(f"--mask-data-dir {folder} has no mask for {image.name}: expected {image.stem}.png")
    file = files[image.stem]
    mask, (width, height) = read_picture(file).convert("L"), read_picture(image).size
    if abs(mask.width * height / (mask.height * width) - 1) > _ALIKE:
        raise ValueError(f"{file} has {mask.width} x {mask.height} pixels, but {image} has {width} x {height}")
    return mask


def _alpha(image: Picture) -> Image.Image:
    """Return how opaque an image is: composed on white and on black, only what is transparent differs."""
    on_white, on_black = (read_picture(image, (grey, grey, grey)) for grey in (255, 0))
    return ImageChops.invert(ImageChops.difference(on_white, on_black)).getchannel("R")
