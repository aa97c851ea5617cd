"""Captions that cannot be used, and those that the model's context cuts short."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from randlora_vision.training.images import SkipList
from randlora_vision.training.pairs import PairSplits
from randlora_vision.training.splits import Part

_AT_ONCE = 1024


def without_empty_captions(part: Part, skipped: SkipList) -> Part:
    """Return the part with captions stripped of white space, and without the images that have none left."""
    if part.captions is None:
        return part
    captions = [[text.strip() for text in texts if text.strip()] for texts in part.captions]
    kept = [index for index, texts in enumerate(captions) if texts]
    for index in sorted(set(range(len(captions))) - set(kept)):
        skipped.add(f"the caption of {part.source}, {part.images[index]}", "it is empty")
    return replace(part, captions=captions).take(kept)


def truncated_captions(splits: PairSplits, tokenize: Any) -> int:
    """Return how many different captions are longer than the context of a tokenizer (open_clip's), which cuts them."""
    texts = {text for split in splits.captions.values() for captions in split for text in captions}
    return sum(_cut(chunk, tokenize) for chunk in _chunks(sorted(texts, key=len), tokenize.context_length))


def _chunks(texts: Sequence[str], context: int) -> Iterator[Sequence[str]]:
    # A token is a byte or more: what has fewer bytes than the context, its two end marks aside, fits for sure.
    long = [text for text in texts if len(text.encode()) > context - 2]
    for start in range(0, len(long), _AT_ONCE):
        yield long[start : start + _AT_ONCE]


def _cut(texts: Sequence[str], tokenize: Any) -> int:
    """Count the texts of which a longer context would keep more: the end mark moves."""
    context = tokenize.context_length
    longer = tokenize(texts, context_length=context + 1)[:, :context]
    return int((longer != tokenize(texts)).any(dim=1).sum())
