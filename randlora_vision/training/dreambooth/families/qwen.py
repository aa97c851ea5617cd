"""Qwen-Image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import Encoded, FlowFamily, StatisticsOfVAE


class QwenImage(StatisticsOfVAE, FlowFamily):
    """Qwen-Image: packed latents of a video VAE, Qwen2.5-VL with texts of any length."""

    pipeline = "QwenImagePipeline"
    packing = 4
    guidance_argument = "true_cfg_scale"

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The text's own output in the last block, after which only the image goes on."""
        config: Any = self.denoiser.config
        last = f"transformer_blocks.{config.num_layers - 1}"
        return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and latents packed two by two."""
        return 2 * int(self.pipe.vae_scale_factor)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens (B, T)."""
        found = self._text(prompts)
        if guided:
            found |= {f"negative_{name}": tensor for name, tensor in self._text([""] * len(prompts)).items()}
        return found

    def _text(self, prompts: Sequence[str]) -> Encoded:
        found, mask = self.pipe.encode_prompt(list(prompts), self.device, **self.text_options)
        if mask is None:  # all tokens count
            mask = torch.ones(found.shape[:2], dtype=torch.long, device=found.device)
        return {"prompt_embeds": found, "prompt_embeds_mask": mask}

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Also give the scale to a transformer with built-in guidance."""
        config: Any = self.denoiser.config
        return {**encoded, **({"guidance_scale": self.options.guidance_scale} if config.guidance_embeds else {})}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        count, channels, height, width = latents.shape
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents, count, channels, height, width),
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            guidance=self.guidance(count),
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_hidden_states_mask=prompt["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.unpack(answer, height * scale, width * scale)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline."""
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked[:, :, 0]
