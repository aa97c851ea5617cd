"""Families that take unpacked latents, one text and its mask: Sana, AuraFlow and PixArt-Sigma; and HunyuanDiT."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import MASKED, Encoded, Family, named
from randlora_vision.training.dreambooth.families.flow import FlowFamily
from randlora_vision.training.dreambooth.families.precision import full_precision
from randlora_vision.training.dreambooth.noise import Noise


class AuraFlow(FlowFamily):
    """AuraFlow: UMT5, whose padding is zeros, so that the transformer needs no mask."""

    pipeline = "AuraFlowPipeline"
    encodings = MASKED

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer."""
        return self.denoiser(latents, prompt["prompt_embeds"], timesteps / 1000).sample


class Sana(AuraFlow):
    """Sana: Gemma 2 with an instruction before every prompt, and a VAE without a distribution."""

    pipeline = "SanaPipeline"
    learned_variance = True
    sampling: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False, "negative_prompt": None}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer with the mask; a predicted variance is left out."""
        config: Any = self.denoiser.config
        answer = self.denoiser(
            latents,
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_attention_mask=prompt["prompt_attention_mask"],
            timestep=timesteps * config.timestep_scale,
        ).sample
        return answer[:, : latents.shape[1]]

    @property
    def patch_area(self) -> int:
        """The area of the transformer's patches."""
        config: Any = self.denoiser.config
        return int(config.patch_size) ** 2

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return the latents (B, C, H, W) themselves."""
        with full_precision(self.device):
            return self.pipe.vae.encode(pixels.to(self.device, torch.float32)).latent.contiguous()

    def latents(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the latents scaled for the denoiser."""
        return self.normalise(moments)


class PixArtSigma(Family):
    """PixArt-Sigma: noise prediction with T5; the predicted variance is not trained."""

    pipeline = "PixArtSigmaPipeline"
    encodings = MASKED
    denoiser_name = "transformer"
    trainable_text_encoders = ()
    loading: ClassVar[Mapping[str, Any]] = {}
    learned_variance = True
    sampling: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False, "negative_prompt": None}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer without image sizes, as the pipeline does."""
        answer = self.denoiser(
            latents,
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_attention_mask=prompt["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return answer[:, : latents.shape[1]]


class HunyuanDiT(PixArtSigma):
    """HunyuanDiT: velocity prediction with BERT and T5, conditioned on image sizes and positions."""

    pipeline = "HunyuanDiTPipeline"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    loading: ClassVar[Mapping[str, Any]] = Family.loading

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with both text encoders, up to 77 and 256 tokens, which the pipeline fixes."""
        names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
        config: Any = self.denoiser.config
        found: Encoded = {}
        for index, (suffix, length) in enumerate((("", config.text_len), ("_2", config.text_len_t5))):
            encoded = self.pipe.encode_prompt(
                list(prompts),
                self.device,
                do_classifier_free_guidance=guided,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            found |= named([name + suffix for name in names], encoded)
        return found

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer with the sizes and the positions of the pipeline."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        denoiser: Any = self.denoiser
        grid = tuple(side // denoiser.config.patch_size for side in latents.shape[2:])
        region = get_resize_crop_region_for_grid(grid, 512 // 8 // denoiser.config.patch_size)
        original, corner, target = sizes.split(2, dim=1)
        answer = denoiser(
            latents,
            timesteps.to(latents.dtype),
            encoder_hidden_states=prompt["prompt_embeds"],
            text_embedding_mask=prompt["prompt_attention_mask"],
            encoder_hidden_states_t5=prompt["prompt_embeds_2"],
            text_embedding_mask_t5=prompt["prompt_attention_mask_2"],
            image_meta_size=torch.cat([original, target, corner], dim=1).to(latents.dtype),
            style=torch.zeros(len(latents), dtype=torch.long, device=latents.device),
            image_rotary_emb=get_2d_rotary_pos_embed(
                denoiser.inner_dim // denoiser.num_heads, region, grid, device=latents.device, output_type="pt"
            ),
        ).sample
        return answer[:, : latents.shape[1]]
