"""The only decoder: every image that Pillow opens becomes 8-bit RGB, by fixed rules that are reported to the caller.

Arrays are (height, width).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor

Note = Callable[[str], None]  # called with the name of each rule that changed an image
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

_TURNS = {  # by the orientation in the EXIF data; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # premultiplied modes, which convert to these alone


def parse_colour(text: str) -> Colour:
    """Return a colour such as white, #ffcc00 or rgb(255,200,0); raise ValueError for anything else."""
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ValueError(f"--background must be a colour such as white or #808080, got {text!r}") from error
    return red, green, blue


def to_rgb(image: Image.Image, background: Colour, note: Note) -> Image.Image:
    """Return the first frame of an opened image as upright 8-bit RGB.

    Values of more than 8 bits are scaled, and transparent pixels are composed on `background`. Raises OSError and
    whatever else Pillow raises for an image that it cannot decode.
    """
    most = Image.MAX_IMAGE_PIXELS
    if most and image.width * image.height > most:  # up to twice as many, Pillow only warns
        raise OSError(f"it has {image.width} x {image.height} pixels, more than {most}")
    if _is_animated(image):
        note("only the first frame of several was used")
    image.load()
    orientation = _orientation(image)
    mask = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, mask = _scaled(image, note)
    elif image.has_transparency_data:
        if image.mode in _PLAIN_ALPHA:
            image = image.convert(_PLAIN_ALPHA[image.mode])
        image = image.convert("RGBA")
        mask = image.getchannel("A")
    elif image.mode not in ("1", "L", "RGB"):
        note(f"converted from {image.mode}" if image.mode != "P" else "converted from a palette")
    rgb = image.convert("RGB")
    if mask is not None and np.asarray(mask).min() < 255:
        note("transparent pixels were composed on the background")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), mask)
    if orientation in _TURNS:
        note("turned upright as its EXIF orientation says")
        rgb = rgb.transpose(_TURNS[orientation])
    return rgb


def _is_animated(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # a broken later frame does not matter
        return bool(getattr(image, "is_animated", False))
    return False


def _orientation(image: Image.Image) -> Any:
    """Return the orientation of the EXIF data, or None for none; damaged EXIF data has none."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def _scaled(image: Image.Image, note: Note) -> tuple[Image.Image, Image.Image | None]:
    """Return an image of 16 or 32 bits as 8-bit grey, and its mask if one of its values stands for transparency.

    White is 65535 for 16 bits. Other values have no fixed white: it is 1, 255 or 65535, the first that none of them
    exceeds (1 only for floats), or the largest value if there are larger or negative ones; then black is the smallest.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise OSError("it has values that are not finite")
    low, high = float(values.min()), float(values.max())
    # Older versions of Pillow open 16-bit files of these two formats in 32-bit mode.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    whites = (65535,) if sixteen else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    fixed = next((white for white in whites if low >= 0 and high <= white), None)
    kind = {"F": "float", "I": "32-bit"}.get(image.mode, "16-bit") if not sixteen else "16-bit"
    if fixed is None:
        note(f"{kind} values scaled to 8 bits between the smallest and the largest value of the image")
        black, white = low, high if high > low else low + 1
    else:
        note(f"{kind} values scaled to 8 bits (white is {fixed})")
        black, white = 0.0, float(fixed)
    bits = np.rint((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)
    key = image.info.get("transparency")
    mask = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    return Image.fromarray(bits), mask
