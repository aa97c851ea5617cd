"""Tokenizers for tiny diffusion pipelines, built without a download: transformers' own classes, vocabularies at hand.

CLIP's comes from the byte-pair vocabulary that open_clip ships, T5's lists characters and the words that it is given.
"""

from collections.abc import Iterable
from functools import lru_cache
from string import ascii_letters, digits, punctuation
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")


def clip_tokenizer(context: int) -> Any:
    """Return CLIP's tokenizer, a `transformers.CLIPTokenizer` with the ids of OpenAI's CLIP (49,408 of them).

    Args:
        context: Its `model_max_length`: what `max_position_embeddings` of the text encoder must be too.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=context)


def t5_tokenizer(context: int, words: Iterable[str] = ()) -> Any:
    """Return a `transformers.T5Tokenizer` for texts in ASCII.

    Args:
        context: Its `model_max_length`.
        words: What becomes a token of its own, in lower case; everything else is spelt by characters.
    """
    from transformers import T5Tokenizer

    marked = [f"\u2581{word}" for word in dict.fromkeys(words)]
    # Unigram takes the split of the highest total score: one known word before many characters.
    pieces = [(piece, 0.0) for piece in _T5_SPECIAL] + [(piece, -10.0) for piece in ("\u2581", *_CHARACTERS)]
    pieces += [(word, -1.0) for word in marked]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=context)


_CHARACTERS = ascii_letters + digits + punctuation


@lru_cache(maxsize=1)
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order."""
    from open_clip.tokenizer import SimpleTokenizer

    stock = SimpleTokenizer()
    # open_clip writes the two special tokens, the last ones, in its own way.
    tokens = list(stock.encoder)[:-2] + [_START, _END]
    return {token: number for number, token in enumerate(tokens)}, sorted(stock.bpe_ranks, key=stock.bpe_ranks.get)
