"""Images with captions as training batches: which caption is drawn, and which captions mean the same."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from randlora_vision.training.data.batches import Pictures, readable_items
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.pictures import Picture, SkipList, Transform, held_out_files

Tokenize = Callable[[Sequence[str]], Tensor]  # texts -> (texts, L) int64


class PairBatch(TypedDict):
    """A batch of images with one caption each.

    `captions` holds numbers. Equal numbers mark captions with the same meaning (the same text, or made from
    the same class), so neither is a negative of the other. `indices` are the images' positions in their
    split.
    """

    images: Tensor  # (B, 3, H, W) float32
    tokens: Tensor  # (B, L) int64
    captions: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64


@dataclass(frozen=True)
class PairSplits:
    """Images and captions, at least one per image, of each split, and the origin of the splits.

    `val` and `test` are as in `ImageSplits`. `groups` is given for captions that were made from classes: the
    class of every image, which then decides which captions mean the same.
    """

    name: str
    images: Mapping[str, Sequence[Picture]]
    captions: Mapping[str, Sequence[Sequence[str]]]
    origin: str
    augment: Callable[[Image.Image], Image.Image] | None = None  # in place of the model's own augmentation
    groups: Mapping[str, Sequence[int]] | None = None
    chosen: Sequence[int] | None = None  # where `train` is a part: its positions in the whole training split

    def select(
        self, split: str, transform: Transform, tokenize: Tokenize, skipped: SkipList, draw: bool | None = None
    ) -> "CaptionedImages":
        """Return one split as a dataset; by default, captions are drawn at random (`draw`) only on `train`."""
        draw = split == "train" if draw is None else draw
        groups = self.groups[split] if self.groups else None
        return CaptionedImages(self.images[split], self.captions[split], transform, tokenize, skipped, groups, draw)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(images)} {name}" for name, images in self.images.items())
        captions = sum(len(texts) for texts in self.captions["train"]) / max(1, len(self.captions["train"]))
        return f"{self.name}: {sizes} images, {captions:.3g} captions each ({self.origin})"

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: the sizes, the origin, and the files that were held out."""
        return {
            "name": self.name,
            "origin": self.origin,
            "sizes": {name: len(images) for name, images in self.images.items()},
            "held_out": held_out_files(self.images),
            **({"chosen": list(self.chosen)} if self.chosen is not None else {}),
        }


class CaptionedImages(Pictures):
    """Pictures with captions: each access draws one of the picture's captions, or returns the first."""

    def __init__(
        self,
        images: Sequence[Picture],
        captions: Sequence[Sequence[str]],
        transform: Transform,
        tokenize: Tokenize,
        skipped: SkipList,
        groups: Sequence[int] | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__(images, transform, skipped)
        assert len(images) == len(captions)
        self.captions = captions
        self.tokenize = tokenize
        self.groups = groups
        self.draw = draw

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int] | None:
        """Return image (3, H, W), tokens (L,), the caption's number and `index`."""
        captions = self.captions[index]
        # Before the picture is read and augmented, so that the caption does not depend on what these draw.
        caption = random.choice(captions) if self.draw else captions[0]
        picture = self.picture(index)
        if picture is None:
            return None
        return self.transform(picture), self.tokenize([caption])[0], self.number(index, caption), index

    def number(self, index: int, caption: str) -> int:
        """Return the number of a caption of an image."""
        return caption_number(caption) if self.groups is None else self.groups[index]

    def texts(self) -> tuple[list[str], list[int], list[int]]:
        """Return all T captions in order, their numbers, and the positions of their images."""
        texts = [(text, index) for index, captions in enumerate(self.captions) for text in captions]
        numbers = [self.number(index, text) for text, index in texts]
        return [text for text, _ in texts], numbers, [index for _, index in texts]

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Tensor, int, int] | None]) -> PairBatch:
        """Stack the readable items of a batch."""
        images, tokens, captions, indices = zip(*readable_items(items), strict=True)
        return PairBatch(
            images=torch.stack(images),
            tokens=torch.stack(tokens),
            captions=torch.tensor(captions),
            indices=torch.tensor(indices),
        )


def caption_number(text: str) -> int:
    """Return a number from 0 to 2^63 - 1 that depends on the text alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def class_captions(splits: ImageSplits, templates: Sequence[str]) -> PairSplits:
    """Turn images with classes into images with captions: every template filled with the class name."""
    captions = [tuple(template.replace("{}", name) for template in templates) for name in splits.class_names]
    return PairSplits(
        name=splits.name,
        images=splits.images,
        captions={split: [captions[label] for label in labels] for split, labels in splits.labels.items()},
        origin=splits.origin,
        augment=splits.augment,
        groups=splits.labels,
        chosen=splits.chosen,
    )


_AT_ONCE = 1024


def truncated_captions(splits: PairSplits, tokenize: Any) -> int:
    """Return how many distinct captions exceed the context of an open_clip tokenizer and are truncated."""
    texts = {text for split in splits.captions.values() for captions in split for text in captions}
    return sum(_cut(chunk, tokenize) for chunk in _chunks(sorted(texts, key=len), tokenize.context_length))


def _chunks(texts: Sequence[str], context: int) -> Iterator[Sequence[str]]:
    # A token is at least one byte, so a text with no more bytes than the context less its two end marks fits.
    long = [text for text in texts if len(text.encode()) > context - 2]
    for start in range(0, len(long), _AT_ONCE):
        yield long[start : start + _AT_ONCE]


def _cut(texts: Sequence[str], tokenize: Any) -> int:
    """Count the texts that are truncated: with a longer context, their end mark moves."""
    context = tokenize.context_length
    longer = tokenize(texts, context_length=context + 1)[:, :context]
    return int((longer != tokenize(texts)).any(dim=1).sum())
