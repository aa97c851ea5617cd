"""Flux.1 and its editor Kontext, and Chroma, which is a Flux without the pooled encoding and the guidance."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import Encoded
from randlora_vision.training.dreambooth.families.flow import FlowFamily


class Flux(FlowFamily):
    """Flux.1: packed latents, one CLIP text encoder (pooled) and a T5 one."""

    pipeline = "FluxPipeline"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    packing = 4

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with both text encoders; Flux has built-in guidance and needs no negative prompt."""
        found, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.device, **self.text_options)
        return {"prompt_embeds": found, "pooled_prompt_embeds": pooled}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        height, width = latents.shape[2:]
        text = prompt["prompt_embeds"]
        tokens, places = self.tokens(latents, prompt)
        answer = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=text.dtype),
            img_ids=places,
            **self.conditions(latents, prompt),
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.unpack(answer[:, : height * width // 4], height * scale, width * scale)

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, Tensor]:
        """Return the tokens of the image (B, T, C) and their positions (T, 3)."""
        count, _, height, width = latents.shape
        places = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
        return self.packed(latents), places

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, H, W) as tokens (B, H W / 4, 4 C)."""
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def conditions(self, latents: Tensor, prompt: Encoded) -> dict[str, Any]:
        """Return what the transformer takes besides latents, timesteps, the text and the positions."""
        return {"guidance": self.guidance(len(latents)), "pooled_projections": prompt["pooled_prompt_embeds"]}

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline."""
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked


class FluxKontext(Flux):
    """Flux.1 Kontext: the tokens of the image to edit follow those of the image that is made."""

    pipeline = "FluxKontextPipeline"
    takes = "image"

    def shown(self, pixels: Tensor, given: Tensor) -> dict[str, Any]:
        """Return the latents, and the area that leaves their size as it is."""
        return {"image": self.condition(pixels, given), "max_area": pixels.shape[-2] * pixels.shape[-1]}

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, Tensor]:
        """Also return the tokens of the image to edit, whose first coordinate is 1."""
        own, places = super().tokens(latents, prompt)
        given, again = super().tokens(prompt["condition"], prompt)
        again = torch.cat([torch.ones_like(again[:, :1]), again[:, 1:]], dim=1)
        return torch.cat([own, given], dim=1), torch.cat([places, again])


class Chroma(Flux):
    """Chroma: a Flux with classifier-free guidance, T5 alone, and a mask over its tokens."""

    pipeline = "ChromaPipeline"
    encodings = (
        *("prompt_embeds", "text_ids", "prompt_attention_mask"),
        *("negative_prompt_embeds", "negative_text_ids", "negative_prompt_attention_mask"),
    )
    text_encoder_names = ("text_encoder",)
    trainable_text_encoders = ()

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens."""
        encoded = FlowFamily.encode(self, prompts, guided)
        return {name: tensor for name, tensor in encoded.items() if not name.endswith("ids")}

    def conditions(self, latents: Tensor, prompt: Encoded) -> dict[str, Any]:
        """Return the mask over the tokens of the text and the image."""
        count, _, height, width = latents.shape
        tokens = (height // 2) * (width // 2)
        mask = self.pipe._prepare_attention_mask(count, tokens, latents.dtype, prompt["prompt_attention_mask"])
        return {"attention_mask": mask}
