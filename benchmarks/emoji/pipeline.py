"""The demo's pipeline before training: a Stable Diffusion 3 with 1.7 million weights and a vocabulary of its own."""

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.emoji.identity import identity_vae
from randlora_vision.demos.emoji import PIXELS

CONTEXT = 12  # the longest prompt of a drawing has 11 tokens
SHIFT = 2.0  # of the noise levels
_WIDTH = 32  # of each of the two text encoders
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_TRANSFORMER = {
    "sample_size": PIXELS,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 2 * _WIDTH,
    "caption_projection_dim": 96,
    "pooled_projection_dim": 2 * _WIDTH,
    "pos_embed_max_size": PIXELS // 4,
}


def build(tokenizer: Any) -> Any:
    """Return the pipeline with random weights."""
    import diffusers

    return diffusers.StableDiffusion3Pipeline(
        vae=identity_vae(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(**_TRANSFORMER),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def make_tokenizer(prompts: Iterable[str]) -> Any:
    """Return a CLIP tokenizer in which every word of the prompts is one token, and other words are spelt out.

    The numbers of its tokens are not the same in every process.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = [prompt.replace("-", " ") for prompt in prompts]  # CLIP's tokenizer splits there too
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), *_SPECIAL]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
