"""What a source of data returns: images with labels or with captions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.data.skipped import SkipList

Label = int | float | str | None


class Stream(Protocol):
    """Shards that are read in order during training."""

    @property
    def shards(self) -> Sequence[str]:
        """Their paths and URLs."""

    def usable(self, shard: str, skipped: SkipList) -> Iterator[tuple[Picture, tuple[Any, ...]]]:
        """Yield the images of a shard, each with its class or captions."""

    def from_classes(self, prompts: Sequence[Sequence[str]], groups: Sequence[int]) -> "Stream":
        """Return the same images with captions that are made from their classes, and the groups of these."""


@dataclass(frozen=True)
class Part:
    """Images of one split with labels, or with captions, as the source has them: missing ones are None or empty."""

    source: str  # its name in messages
    images: Sequence[Picture]
    labels: Sequence[Label] | None = None
    captions: Sequence[Sequence[str | None]] | None = None
    class_names: Sequence[str] | None = None  # names for integer labels, if there are any

    def take(self, indices: Iterable[int]) -> "Part":
        """Return the images at `indices`, in that order."""
        indices = list(indices)
        return replace(
            self,
            images=[self.images[i] for i in indices],
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            captions=None if self.captions is None else [self.captions[i] for i in indices],
        )

    def __add__(self, other: "Part") -> "Part":
        """Return the images of both."""
        return replace(
            self,
            source=f"{self.source} and {other.source}",
            images=[*self.images, *other.images],
            labels=None if self.labels is None else [*self.labels, *(other.labels or ())],
            captions=None if self.captions is None else [*self.captions, *(other.captions or ())],
        )
