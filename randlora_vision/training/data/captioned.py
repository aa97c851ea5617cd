"""Images with captions as training batches: which caption is drawn, and which captions mean the same."""

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from randlora_vision.training.data.batches import Pictures
from randlora_vision.training.data.labelled import NOT_MEASURED, ImageSplits
from randlora_vision.training.data.pictures import Picture, Transform
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.split_images import SplitImages

Tokenize = Callable[[Sequence[str]], Tensor]  # texts -> (texts, L) int64


class PairBatch(TypedDict):
    """A batch of images with one caption each.

    `captions` holds numbers. Equal numbers mark captions with the same meaning (the same tokens, or made from
    the same class), so neither is a negative of the other. `indices` are the images' positions in their
    split, or `NOT_MEASURED` where they have none.
    """

    images: Tensor  # (B, 3, H, W) float32
    tokens: Tensor  # (B, L) int64
    captions: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64


@dataclass(frozen=True, kw_only=True)
class PairSplits(SplitImages):
    """Images with captions, at least one per image.

    `groups` is given for captions that were made from classes: the class of every image, which then decides which
    captions mean the same.
    """

    tables: ClassVar = ("images", "captions", "groups")
    captions: Mapping[str, Sequence[Sequence[str]]]
    groups: Mapping[str, Sequence[int]] | None = None

    def select(
        self, split: str, transform: Transform, tokenize: Tokenize, skipped: SkipList, draw: bool | None = None
    ) -> "CaptionedImages":
        """Return one split as a dataset; by default, captions are drawn at random (`draw`) only on `train`."""
        draw = split == "train" if draw is None else draw
        groups = self.groups[split] if self.groups else None
        images, captions = self.images[split], self.captions[split]
        return self.reading(CaptionedImages(images, captions, transform, tokenize, skipped, groups, draw), split)

    def __str__(self) -> str:
        everyone = next(texts for texts in self.captions.values() if texts or not self.stream)
        captions = sum(len(texts) for texts in everyone) / max(1, len(everyone))
        return f"{self.name}: {self.sizes}, {captions:.3g} captions each ({self.origin})"


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
        group = None if self.groups is None else self.groups[index]
        return self.read(self.images[index], self.captions[index], group, index)

    def read(
        self, image: Picture, captions: Sequence[str], group: int | None, index: int = NOT_MEASURED
    ) -> tuple[Tensor, Tensor, int, int] | None:
        """Return the same for an image with its captions, and their class if they were made from one."""
        # Before the picture is read and augmented, so that the caption does not depend on what these draw.
        caption = random.choice(captions) if self.draw else captions[0]
        picture = self.decode(image)
        if picture is None:
            return None
        tokens = self.tokenize([caption])[0]
        return self.transform(picture), tokens, token_number(tokens) if group is None else group, index

    @functools.cached_property
    def texts(self) -> "Texts":
        """All captions of the images, in order."""
        places = [index for index, captions in enumerate(self.captions) for _ in captions]
        texts = [text for captions in self.captions for text in captions]
        distinct = list(dict.fromkeys(texts))
        tokens = (self.tokenize(distinct[at : at + _AT_ONCE]) for at in range(0, len(distinct), _AT_ONCE))
        of_text = dict(zip(distinct, (token_number(row) for rows in tokens for row in rows), strict=True))
        same = [of_text[text] for text in texts]
        return Texts(texts, same, same if self.groups is None else [self.groups[index] for index in places], places)

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Tensor, int, int]], measured: bool = True) -> PairBatch:
        """Stack items; unless `measured`, the indices are `NOT_MEASURED`."""
        images, tokens, captions, indices = zip(*items, strict=True)
        return PairBatch(
            images=torch.stack(images),
            tokens=torch.stack(tokens),
            captions=torch.tensor(captions),
            indices=torch.tensor(indices) if measured else torch.full((len(items),), NOT_MEASURED),
        )


@dataclass(frozen=True)
class Texts:
    """All T captions of some images."""

    texts: Sequence[str]
    tokens: Sequence[int]  # equal for captions with equal tokens
    numbers: Sequence[int]  # equal for captions with the same meaning, as in `PairBatch`
    images: Sequence[int]  # the positions of their images


def token_number(tokens: Tensor) -> int:
    """Return a number from 0 to 2^63 - 1 that depends on the tokens (L,) alone, on every machine.

    Captions that differ only in case, in HTML entities or beyond the context of the model have equal tokens: the model
    cannot tell them apart.
    """
    content = tokens.to(torch.int64).numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def class_captions(splits: ImageSplits, templates: Sequence[str], tokenize: Tokenize | None = None) -> PairSplits:
    """Turn images with classes into images with captions: every template filled with the class name.

    Classes whose captions have equal tokens are one group, given the tokenizer.
    """
    captions = [tuple(template.replace("{}", name) for template in templates) for name in splits.class_names]
    alike: dict[Any, int] = {}
    meanings = (texts if tokenize is None else tuple(map(token_number, tokenize(texts))) for texts in captions)
    groups = [alike.setdefault(meaning, label) for label, meaning in enumerate(meanings)]
    common = {field.name: getattr(splits, field.name) for field in fields(SplitImages)}
    return PairSplits(
        **{**common, "stream": splits.stream and splits.stream.from_classes(captions, groups)},
        captions={split: [captions[label] for label in labels] for split, labels in splits.labels.items()},
        groups={split: [groups[label] for label in labels] for split, labels in splits.labels.items()},
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
