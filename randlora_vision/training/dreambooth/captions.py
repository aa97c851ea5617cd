"""Captions as training draws them: with a trigger word, with their tags in another order, or empty."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from randlora_vision.training.dreambooth.families import with_image_of
from randlora_vision.training.dreambooth.options import SubjectOptions

_ORDERS = 16  # of the tags of a caption: few enough to encode all of them before training


@dataclass(frozen=True)
class Variants:
    """The indices, in a list of prompts, of the texts that stand for one caption."""

    texts: Sequence[int]  # of which one is drawn
    empty: int | None = None  # drawn instead at the rate `dropout`
    dropout: float = 0.0

    def draw(self) -> int:
        """Draw an index with Python's `random`, which is not called if there is nothing to choose."""
        if self.empty is not None and random.random() < self.dropout:
            return self.empty
        return self.texts[0] if len(self.texts) == 1 else random.choice(self.texts)


def with_trigger(caption: str, word: str | None) -> str:
    """Return a caption that begins with the trigger word, unless it contains it already."""
    if not word or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{word}, {caption}" if caption else word


def orders_of(caption: str, keep: int, seed: int) -> list[str]:
    """Return a caption and up to 15 other orders of its tags, which are separated by commas; the first `keep` stay."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    generator = random.Random(f"{seed} {caption}")
    found = [caption]
    for _ in range(_ORDERS - 1):
        found.append(", ".join([*tags[:keep], *generator.sample(tags[keep:], len(tags[keep:]))]))
    return list(dict.fromkeys(found))


def variants_of(caption: str, options: SubjectOptions, seed: int, prompts: list[str]) -> Variants:
    """Return the variants of a caption, adding their texts to `prompts`."""

    def place(text: str) -> int:
        text = with_image_of(caption, text)
        if text not in prompts:
            prompts.append(text)
        return prompts.index(text)

    texts = orders_of(caption, options.keep_tokens, seed) if options.shuffle_caption else [caption]
    empty = place("") if options.caption_dropout_rate else None
    return Variants([place(text) for text in texts], empty, options.caption_dropout_rate)
