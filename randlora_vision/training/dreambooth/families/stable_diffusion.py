"""Stable Diffusion XL, 3 and 3.5, and Kolors, which has the denoiser of XL and another text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from randlora_vision.training.dreambooth.families.base import POOLED, Encoded, Family, named
from randlora_vision.training.dreambooth.families.flow import FlowFamily


class SDXL(Family):
    """Stable Diffusion XL: two text encoders, and conditioning on image sizes."""

    pipeline = "StableDiffusionXLPipeline"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    trainable_text_encoders: ClassVar[tuple[str, ...]] = text_encoder_names
    loading: ClassVar[Mapping[str, Any]] = {}
    encodings = POOLED
    additions = ("text_time",)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Also condition on the pooled encoding and the sizes."""
        added = {"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": sizes.to(latents.dtype)}
        return self.denoiser(
            latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"], added_cond_kwargs=added
        ).sample


class Kolors(SDXL):
    """Kolors: the denoiser of XL with one text encoder, ChatGLM3."""

    pipeline = "KolorsPipeline"
    text_encoder_names = ("text_encoder",)
    trainable_text_encoders = ()

    @property
    def text_options(self) -> dict[str, Any]:
        """None: the call of this pipeline encodes 256 tokens, whatever its max_sequence_length says."""
        return {}


class SD3(FlowFamily):
    """Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5 one, which may be missing."""

    pipeline = "StableDiffusion3Pipeline"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with all text encoders."""
        texts = list(prompts)
        return named(
            POOLED,
            self.pipe.encode_prompt(
                texts, texts, texts, device=self.device, do_classifier_free_guidance=guided, **self.text_options
            ),
        )

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer."""
        return self.denoiser(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
        ).sample
