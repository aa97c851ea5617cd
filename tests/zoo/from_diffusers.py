"""diffusers: the denoisers of every family, and the autoencoder for its convolutions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import Entry, entry, numbers, precision

Inputs = dict[str, Any]

TEXT, POOLED, CHANNELS, SIZE = 24, 20, 4, 8


def image(model: nn.Module, channels: int = CHANNELS) -> Tensor:
    return numbers(model, 2, channels, SIZE, SIZE)


def video(model: nn.Module) -> Tensor:
    return numbers(model, 2, CHANNELS, 2, SIZE, SIZE)


def text(model: nn.Module, length: int = 5) -> Tensor:
    return numbers(model, 2, length, TEXT)


def pooled(model: nn.Module) -> Tensor:
    return numbers(model, 2, POOLED)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def steps() -> Tensor:
    return torch.tensor([3, 7])


def grid(height: int, width: int) -> Tensor:
    """Position ids of Flux: (image, row, column) of every token."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, 3)


def rotary(model: nn.Module) -> tuple[Tensor, Tensor]:
    angles = numbers(model, SIZE * SIZE // 4, 16).float()
    return angles.cos(), angles.sin()


def stable_diffusion(model: nn.Module) -> Inputs:
    return {"sample": image(model), "timestep": 3, "encoder_hidden_states": text(model)}


def sdxl(model: nn.Module) -> Inputs:
    added = {"text_embeds": pooled(model), "time_ids": torch.tensor([[8, 8, 0, 0, 8, 8]] * 2)}
    return stable_diffusion(model) | {"added_cond_kwargs": added}


def unconditional(model: nn.Module) -> Inputs:
    return {"sample": image(model, channels=3), "timestep": 3}


def denoising(hidden: Tensor, prompt: Tensor, **more: Any) -> Inputs:
    return {"hidden_states": hidden, "timestep": steps(), "encoder_hidden_states": prompt} | more


def hunyuan(model: nn.Module) -> Inputs:
    texts = {"encoder_hidden_states_t5": numbers(model, 2, 6, 32), "text_embedding_mask_t5": ones(2, 6)}
    return denoising(image(model), text(model), text_embedding_mask=ones(2, 5)) | texts | {
        "timestep": steps().to(precision(model)),  # the model works in the precision of its time steps
        "image_meta_size": numbers(model, 2, 6),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": rotary(model),
    }  # fmt: skip


def flux(model: nn.Module, **more: Any) -> Inputs:
    positions = {"img_ids": grid(4, 4), "txt_ids": torch.zeros(5, 3)}
    return denoising(numbers(model, 2, 16, 2 * CHANNELS), text(model), timestep=steps() / 10, **positions, **more)


def make(model: str, options: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, model)(**options)


def run(model: nn.Module, inputs: Callable[[nn.Module], Inputs]) -> Tensor:
    return model(**inputs(model), return_dict=False)[0].flatten()


def denoiser(
    name: str, model: str, options: dict[str, Any], inputs: Callable[[nn.Module], Inputs], **zoo: Any
) -> Entry:
    return entry(f"diffusers/{name}", partial(make, model, options), partial(run, inputs=inputs), **zoo)


# fmt: off
HEADS = dict(num_attention_heads=2, attention_head_dim=16)
SAME = dict(in_channels=CHANNELS, out_channels=CHANNELS)
UNET = dict(sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
SD15 = dict(UNET, cross_attention_dim=TEXT, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
ROPE = dict(axes_dims_rope=(4, 6, 6), joint_attention_dim=TEXT)
FLUX = dict(HEADS, **ROPE, in_channels=2 * CHANNELS, num_layers=1, num_single_layers=1)
INSIDE = dict(float32_inside=True)
# The last block's text stream ends there: it feeds the image's keys and values, and nothing asks for its own output.
TEXT_ENDS = (r"^transformer_blocks\.1\.attn1?\.add_q_proj\.weight",)
QWEN_TEXT_ENDS = (r"^transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp\.net\..*)\.weight",)

ENTRIES = [
    denoiser("unet_sd15", "UNet2DConditionModel", SD15, stable_diffusion),
    denoiser("unet_sd15_all", "UNet2DConditionModel", SD15, stable_diffusion, target="all"),
    denoiser("unet_sdxl", "UNet2DConditionModel",
             dict(SD15, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                  projection_class_embeddings_input_dim=6 * 8 + POOLED, transformer_layers_per_block=(2, 1)), sdxl),
    denoiser("unet_uncond", "UNet2DModel",
             dict(UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                  up_block_types=("AttnUpBlock2D", "UpBlock2D")), unconditional),
    denoiser("unet_fir", "UNet2DModel",
             dict(UNET, block_out_channels=(32, 32), down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                  up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")), unconditional, target="all"),
    denoiser("dit", "DiTTransformer2DModel",
             dict(HEADS, num_layers=2, sample_size=SIZE, norm_num_groups=8, num_embeds_ada_norm=10),
             lambda m: dict(hidden_states=image(m), timestep=steps(), class_labels=steps())),
    denoiser("pixart", "PixArtTransformer2DModel",
             dict(HEADS, num_layers=2, sample_size=SIZE, cross_attention_dim=32, caption_channels=TEXT,
                  use_additional_conditions=False),
             lambda m: denoising(image(m), text(m), added_cond_kwargs=dict(resolution=None, aspect_ratio=None))),
    denoiser("sd3", "SD3Transformer2DModel",
             dict(HEADS, **SAME, sample_size=SIZE, num_layers=2, joint_attention_dim=TEXT, caption_projection_dim=32,
                  pooled_projection_dim=POOLED, pos_embed_max_size=SIZE, qk_norm="rms_norm",
                  dual_attention_layers=(0,)),
             lambda m: denoising(image(m), text(m), pooled_projections=pooled(m)), unreachable=TEXT_ENDS, **INSIDE),
    denoiser("flux", "FluxTransformer2DModel", dict(FLUX, pooled_projection_dim=POOLED, guidance_embeds=True),
             lambda m: flux(m, pooled_projections=pooled(m), guidance=torch.tensor([3.5, 3.5])), **INSIDE),
    denoiser("chroma", "ChromaTransformer2DModel",
             dict(FLUX, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1),
             flux, **INSIDE),
    denoiser("auraflow", "AuraFlowTransformer2DModel",
             dict(HEADS, sample_size=SIZE, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=TEXT,
                  caption_projection_dim=32, pos_embed_max_size=16),
             lambda m: denoising(image(m), text(m), timestep=steps() / 10), **INSIDE),
    denoiser("sana", "SanaTransformer2DModel",
             dict(HEADS, **SAME, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
                  cross_attention_dim=32, caption_channels=TEXT, sample_size=SIZE),
             lambda m: denoising(image(m), text(m)), **INSIDE),
    denoiser("hunyuan_dit", "HunyuanDiT2DModel",
             dict(HEADS, in_channels=CHANNELS, patch_size=2, sample_size=SIZE, hidden_size=32, num_layers=2,
                  cross_attention_dim=TEXT, cross_attention_dim_t5=32, pooled_projection_dim=POOLED, text_len=5,
                  text_len_t5=6), hunyuan, **INSIDE),
    denoiser("cogvideox", "CogVideoXTransformer3DModel",
             dict(HEADS, **SAME, time_embed_dim=16, text_embed_dim=TEXT, num_layers=2, sample_width=SIZE,
                  sample_height=SIZE, sample_frames=5, max_text_seq_length=5),
             lambda m: denoising(video(m).transpose(1, 2), text(m))),
    denoiser("ltx", "LTXVideoTransformer3DModel",
             dict(HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=TEXT),
             lambda m: denoising(numbers(m, 2, 8, 8), text(m), encoder_attention_mask=ones(2, 5), num_frames=2,
                                 height=2, width=2), **INSIDE),
    denoiser("lumina2", "Lumina2Transformer2DModel",
             dict(sample_size=SIZE, in_channels=CHANNELS, hidden_size=32, num_layers=1, num_refiner_layers=1,
                  num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6),
                  axes_lens=(16, 16, 16), cap_feat_dim=TEXT),
             lambda m: denoising(image(m), text(m), timestep=steps() / 10, encoder_attention_mask=ones(2, 5).bool()),
             **INSIDE),
    # Wan takes the last 512 tokens for the text, whatever comes before for the image.
    denoiser("wan", "WanTransformer3DModel",
             dict(HEADS, **SAME, text_dim=TEXT, freq_dim=16, ffn_dim=48, num_layers=2, image_dim=12,
                  added_kv_proj_dim=32, rope_max_seq_len=16),
             lambda m: denoising(video(m), text(m, 512), encoder_hidden_states_image=numbers(m, 2, 3, 12)), **INSIDE),
    denoiser("qwen_image", "QwenImageTransformer2DModel",
             dict(HEADS, **ROPE, in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2),
             lambda m: denoising(numbers(m, 2, 16, 4 * CHANNELS), text(m), timestep=steps() / 10,
                                 encoder_hidden_states_mask=ones(2, 5), img_shapes=[[(1, 4, 4)]] * 2),
             unreachable=QWEN_TEXT_ENDS, **INSIDE),
    denoiser("mochi", "MochiTransformer3DModel",
             dict(HEADS, in_channels=CHANNELS, num_layers=2, pooled_projection_dim=16, text_embed_dim=TEXT,
                  time_embed_dim=16, max_sequence_length=5),
             lambda m: denoising(video(m), text(m), encoder_attention_mask=ones(2, 5).bool()),
             unreachable=TEXT_ENDS, **INSIDE),
    denoiser("autoencoder", "AutoencoderKL",
             dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
             lambda m: dict(sample=image(m, channels=3)), target="all"),
]
# fmt: on
