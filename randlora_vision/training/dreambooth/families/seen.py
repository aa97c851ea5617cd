"""Prompts with images that the text encoder sees, as those of Qwen-Image-Edit."""

import hashlib
from collections.abc import Sequence
from typing import Any


class Seen(str):
    """A prompt with its images; prompts of different images differ."""

    images: tuple[Any, ...]  # PIL images

    def __new__(cls, text: str, images: Sequence[Any]) -> "Seen":
        """Return the prompt."""
        made = super().__new__(cls, text)
        made.images = tuple(images)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and str.__eq__(self, other) and self._identities == other._identities

    def __ne__(self, other: object) -> bool:
        return not self == other  # str has one of its own

    def __hash__(self) -> int:
        return hash((str(self), self._identities))

    @property
    def _identities(self) -> tuple[int, ...]:
        return tuple(map(id, self.images))

    def __repr__(self) -> str:
        images = [(image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in self.images]
        return f"Seen({str.__repr__(self)}, {images})"


def with_image_of(prompt: str, text: str) -> str:
    """Return a text with the images of a prompt, if it has some."""
    return Seen(text, prompt.images) if isinstance(prompt, Seen) else text
