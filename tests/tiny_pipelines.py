"""Pipelines of diffusers' real classes with random weights: small enough to build and sample in a fraction of a second.

Every one makes images of 16 x 16 pixels (latents of 8 x 8) from prompts of at most 16 tokens. Where images must agree
bit for bit, compare two built pipelines or two loaded ones: memory that safetensors maps is aligned in another way than
allocated memory, and a matrix product may round differently.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from torch import Tensor

from benchmarks import clip_vocabulary
from tests.copies import template
from tests.zoo.base import unmute

_T5_SPECIAL = ("<pad>", "</s>", "<unk>")


def copied(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pipeline once and give copies, but for the whole tokenizer: they take a fraction of a new one's time."""

    @functools.cache
    def kept(**options: Any) -> tuple[Any, Callable[[], Any]]:
        pipe = make(**options)
        parts = {name: part for name, part in pipe.components.items() if getattr(part, "vocab_size", 0) != WHOLE}
        return pipe, template(parts)

    @functools.wraps(make)
    def copy_of_it(**options: Any) -> Any:
        original, parts = kept(**options)
        pipe = copy.copy(original)
        for name, part in parts().items():
            setattr(pipe, name, part)
        return pipe

    return copy_of_it


def t5_tokenizer(context: int, words: Iterable[str] = ()) -> Any:
    """Return a `transformers.T5Tokenizer` for texts in ASCII.

    Args:
        context: Its `model_max_length`.
        words: What becomes a token of its own, in lower case; everything else is spelt by characters.
    """
    from transformers import T5Tokenizer

    marked = [f"\u2581{word}" for word in dict.fromkeys(words)]
    # Unigram takes the split of the highest total score: one known word before many characters.
    pieces = [(piece, 0.0) for piece in _T5_SPECIAL] + [
        (piece, -10.0) for piece in ("\u2581", *(ascii_letters + digits + punctuation))
    ]
    pieces += [(word, -1.0) for word in marked]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=context)


def clip_tokenizer(context: int) -> Any:
    """Return CLIP's tokenizer with its first thousand merges: the whole vocabulary takes longer to load than a run."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary.clip_vocabulary()
    tokens = list(vocabulary)
    kept = [*tokens[: len(tokens) - len(merges) - 2 + _MERGES], *tokens[-2:]]
    numbered = {token: number for number, token in enumerate(kept)}
    return CLIPTokenizer(vocab=numbered, merges=merges[:_MERGES], model_max_length=context)


@functools.cache
def _whole_tokenizer() -> Any:
    """It takes longer to make than all the rest of a pipeline."""
    return clip_vocabulary.clip_tokenizer(CONTEXT)


PIXELS, LATENTS, CONTEXT = 16, 4, 16
_MERGES, VOCABULARY, WHOLE = 1000, 1514, 49408
CLIP_WIDTH, T5_WIDTH, WORDS = 32, 24, ("a", "photo", "of", "sks", "digit", "dog")

# fmt: off
UNET = dict(sample_size=8, in_channels=LATENTS, out_channels=LATENTS, layers_per_block=1, norm_num_groups=8)
SD15 = dict(UNET, block_out_channels=(16, 32), cross_attention_dim=CLIP_WIDTH, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SDXL = dict(UNET, block_out_channels=(16, 32), cross_attention_dim=2 * CLIP_WIDTH, attention_head_dim=(2, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH)
SD3 = dict(sample_size=8, patch_size=2, in_channels=LATENTS, out_channels=LATENTS, num_layers=2, attention_head_dim=16,
           num_attention_heads=2, joint_attention_dim=2 * CLIP_WIDTH + 8, caption_projection_dim=32,
           pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=8)
FLUX = dict(patch_size=1, in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH,
            axes_dims_rope=(4, 6, 6), guidance_embeds=True)
# fmt: on


@copied
def sd15() -> Any:
    """A StableDiffusionPipeline: noise prediction, one CLIP text encoder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return built(
        lambda: StableDiffusionPipeline(
            vae=vae(scaling_factor=0.18215),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(CONTEXT),
            unet=UNet2DConditionModel(**SD15),
            scheduler=DDIMScheduler(**NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@copied
def shallow_sd15() -> Any:
    """A StableDiffusionPipeline whose UNet has one block with attention and one without, for what takes many steps."""
    from diffusers import UNet2DConditionModel

    pipe = sd15()
    sides = dict(down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(**{**SD15, **sides, "block_out_channels": (16,)}).eval()
        unmute(pipe.unet)
    return pipe


@copied
def sdxl(vocabulary: int = WHOLE) -> Any:
    """A StableDiffusionXLPipeline: two CLIP text encoders, the second one with a projection.

    It keeps the whole vocabulary: with other random weights its second step turns rounding into visible differences.
    Where bits are compared, `VOCABULARY` is saved and loaded in a fraction of the time.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = _whole_tokenizer if vocabulary == WHOLE else functools.partial(clip_tokenizer, CONTEXT)
    return built(
        lambda: StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=clip_text(vocabulary=vocabulary),
            text_encoder_2=clip_text(projected=True, vocabulary=vocabulary),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=UNet2DConditionModel(**SDXL),
            scheduler=DDIMScheduler(**NOISE),
        )
    )


@copied
def sd3() -> Any:
    """A StableDiffusion3Pipeline: flow matching, two CLIP text encoders and a T5 one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return built(
        lambda: StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**SD3),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text(projected=True),
            tokenizer=clip_tokenizer(CONTEXT),
            text_encoder_2=clip_text(projected=True),
            tokenizer_2=clip_tokenizer(CONTEXT),
            text_encoder_3=t5(2 * CLIP_WIDTH + 8),
            tokenizer_3=t5_tokenizer(CONTEXT, WORDS),
        )
    )


@copied
def flux() -> Any:
    """A FluxPipeline: flow matching with a guidance embedding, a CLIP text encoder and a T5 one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return built(
        lambda: FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(CONTEXT),
            text_encoder_2=t5(T5_WIDTH),
            tokenizer_2=t5_tokenizer(CONTEXT, WORDS),
            transformer=FluxTransformer2DModel(**FLUX),
        )
    )


PIPELINES: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


@torch.no_grad()
def sample(pipe: Any, prompt: str = "a photo of sks digit", steps: int = 2, seed: int = 0, **options: Any) -> Tensor:
    """One image as the VAE leaves it, (3, 16, 16), the same for the same weights."""
    if type(pipe).__name__ in ("StableDiffusion3Pipeline", "FluxPipeline"):
        options.setdefault("max_sequence_length", CONTEXT)
    generator = torch.Generator().manual_seed(seed)
    size = dict(height=PIXELS, width=PIXELS, num_inference_steps=steps)
    return pipe(prompt, generator=generator, output_type="pt", **size, **options).images[0]


NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def built(make: Callable[[], Any]) -> Any:
    """The pipeline drawn from a fixed seed, every branch of its denoisers audible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
        for name in ("unet", "transformer", "transformer_2"):
            if (denoiser := getattr(pipe, name, None)) is not None:
                unmute(denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(levels: int = 2, kind: Any = None, **options: Any) -> Any:
    """A VAE that makes images smaller by 2 to the power of `levels - 1`."""
    from diffusers import AutoencoderKL

    return (kind or AutoencoderKL)(
        block_out_channels=(8,) * (levels - 1) + (16,),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENTS,
        sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **options,
    )


def clip_text(projected: bool = False, context: int = CONTEXT, vocabulary: int = VOCABULARY) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int, tokenizer: Any = None) -> Any:
    """A T5 encoder for the texts of a tokenizer."""
    from transformers import T5Config, T5EncoderModel

    vocabulary = len(tokenizer or t5_tokenizer(CONTEXT, WORDS))
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_kv=12, d_ff=2 * width, num_layers=2, num_heads=2)
    ).eval()
