"""Flux.1, and Chroma, which is a Flux without the pooled encoding and the guidance."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import Encoded, FlowFamily, named


class Flux(FlowFamily):
    """Flux.1: packed latents, one CLIP text encoder (pooled) and a T5 one."""

    pipeline = "FluxPipeline"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    packing = 4

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and latents packed two by two."""
        return 2 * int(self.pipe.vae_scale_factor)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with both text encoders; Flux has built-in guidance and needs no negative prompt."""
        found, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.device, **self.text_options)
        return {"prompt_embeds": found, "pooled_prompt_embeds": pooled}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        count, channels, height, width = latents.shape
        text = prompt["prompt_embeds"]
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents, count, channels, height, width),
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=text.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, text.dtype),
            **self.conditions(latents, prompt),
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.unpack(answer, height * scale, width * scale)

    def conditions(self, latents: Tensor, prompt: Encoded) -> dict[str, Any]:
        """Return what the transformer takes besides latents, timesteps, the text and the positions."""
        return {"guidance": self.guidance(len(latents)), "pooled_projections": prompt["pooled_prompt_embeds"]}

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline."""
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked


class Chroma(Flux):
    """Chroma: a Flux with classifier-free guidance, T5 alone, and a mask over its tokens."""

    pipeline = "ChromaPipeline"
    text_encoder_names = ("text_encoder",)
    trainable_text_encoders = ()

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens."""
        names = ("prompt_embeds", "", "prompt_attention_mask")
        found = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=guided, **self.text_options
        )
        encoded = named((*names, *(f"negative_{name}" for name in names)), found)
        return {name: tensor for name, tensor in encoded.items() if name not in ("", "negative_")}  # position ids

    def conditions(self, latents: Tensor, prompt: Encoded) -> dict[str, Any]:
        """Return the mask over the tokens of the text and the image."""
        count, _, height, width = latents.shape
        tokens = (height // 2) * (width // 2)
        mask = self.pipe._prepare_attention_mask(count, tokens, latents.dtype, prompt["prompt_attention_mask"])
        return {"attention_mask": mask}
