"""The CLIP tokenizer of transformers, built without a download from the vocabulary that open_clip ships."""

from functools import lru_cache
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(context: int) -> Any:
    """Return OpenAI's CLIP tokenizer; `context` must equal `max_position_embeddings` of the text encoder."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=context)


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a dictionary from token to id, and the merges in order."""
    from open_clip.tokenizer import SimpleTokenizer

    stock = SimpleTokenizer()
    # open_clip spells the two special tokens, which are the last ones, differently.
    tokens = list(stock.encoder)[:-2] + [_START, _END]
    return {token: number for number, token in enumerate(tokens)}, sorted(stock.bpe_ranks, key=stock.bpe_ranks.get)
