"""CLIP's tokenizer as transformers' own class, built without a download from the vocabulary that open_clip ships."""

from functools import lru_cache
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(context: int) -> Any:
    """Return CLIP's tokenizer, a `transformers.CLIPTokenizer` with the ids of OpenAI's CLIP (49,408 of them).

    Args:
        context: Its `model_max_length`: what `max_position_embeddings` of the text encoder must be too.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=context)


@lru_cache(maxsize=1)
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order."""
    from open_clip.tokenizer import SimpleTokenizer

    stock = SimpleTokenizer()
    # open_clip writes the two special tokens, the last ones, in its own way.
    tokens = list(stock.encoder)[:-2] + [_START, _END]
    return {token: number for number, token in enumerate(tokens)}, sorted(stock.bpe_ranks, key=stock.bpe_ranks.get)
