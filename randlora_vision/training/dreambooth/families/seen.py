"""Prompts with an image that the text encoder sees, as those of Qwen-Image-Edit."""

import hashlib
from typing import Any


class Seen(str):
    """A prompt with its image; prompts of different images differ."""

    image: Any  # a PIL image

    def __new__(cls, text: str, image: Any) -> "Seen":
        """Return the prompt."""
        made = super().__new__(cls, text)
        made.image = image
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and str.__eq__(self, other) and self.image is other.image

    def __ne__(self, other: object) -> bool:
        return not self == other  # str has one of its own

    def __hash__(self) -> int:
        return hash((str(self), id(self.image)))

    def __repr__(self) -> str:
        pixels = hashlib.sha256(self.image.tobytes()).hexdigest()
        return f"Seen({str.__repr__(self)}, {self.image.size}, {pixels})"


def with_image_of(prompt: str, text: str) -> str:
    """Return a text with the image of a prompt, if it has one."""
    return Seen(text, prompt.image) if isinstance(prompt, Seen) else text
