"""The images that the pictures of editing and inpainting pipelines are made from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.buckets import Size, fit
from randlora_vision.training.dreambooth.families import Takes
from randlora_vision.training.dreambooth.given import as_given, middle_mask
from randlora_vision.training.dreambooth.subject import Subject

Shown = tuple[Tensor, Tensor]  # images (N, 3, h, w), between -1 and 1, and what is given with them
_SHOWN = 8  # most images of the subject


def images_shown(subject: Subject, files: Sequence[str], takes: Takes, size: Size) -> Shown | None:
    """Return the images that pictures are made from, in turn, and their masks or the images to edit.

    Args:
        subject: The subject, whose first images are shown if there are no `files`.
        files: Image files, whose middle half is made anew if the family takes masks.
        takes: What the family takes; nothing is shown for None.
        size: The size of the pictures (height, width).

    Returns:
        The images (N, 3, h, w), between -1 and 1, and what is given with them, as for `Family.condition`; or None.
    """
    if takes is None:
        if files:
            raise ValueError("--validation-image is for pipelines that edit or inpaint images")
        return None
    images: Sequence[Picture] = [Path(file) for file in files] or subject.images[:_SHOWN]
    masks = None if subject.masks is None else [(mask,) for mask in subject.masks]
    own: Sequence[Sequence[Picture]] | None = masks if takes == "mask" else subject.originals
    pixels, given = [], []
    for number, image in enumerate(images):
        found, sizes = fit(read_picture(image), size, center_crop=True)
        pixels.append(found)
        if takes != "mask" and files:
            given.append(found if takes == "image" else found[None])
        elif own is None or files:
            given.append(middle_mask(size))
        else:
            given.append(as_given([read_picture(picture) for picture in own[number]], sizes, takes))
    return torch.stack(pixels), torch.stack(given)
