"""Families whose transformer counts time from noise (0) to image (1) and predicts image - noise: the pipeline negates.

Z-Image, Lumina 2 and HiDream (which predicts the negative but counts time as others do).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from randlora_vision.training.dreambooth.families.base import MASKED, Encoded
from randlora_vision.training.dreambooth.families.flow import FlowFamily


class Lumina2(FlowFamily):
    """Lumina 2: Gemma 2, with a system prompt before every prompt and none before the empty one."""

    pipeline = "Lumina2Pipeline"
    encodings = MASKED

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer with reversed time."""
        return -self.denoiser(
            hidden_states=latents,
            timestep=1 - timesteps / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_attention_mask=prompt["prompt_attention_mask"],
        ).sample


class ZImage(FlowFamily):
    """Z-Image: Qwen3, with a list of texts of different lengths, which are padded with zeros and a mask here."""

    pipeline = "ZImagePipeline"

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and patches of two by two."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def default_resolution(self) -> int:
        """The default of the pipeline."""
        return 1024

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens (B, T)."""
        texts = self.pipe.encode_prompt(list(prompts), self.device, guided, **self.text_options)
        found: Encoded = {}
        for name, encoded in zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True):
            if len(encoded):
                found[name] = pad_sequence(list(encoded), batch_first=True)
                found[f"{name}_mask"] = pad_sequence([torch.ones(len(text)) for text in encoded], batch_first=True)
        return found

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Return the lists of texts."""
        names = [name for name in encoded if not name.endswith("_mask")]
        return {name: _cut(encoded[name], encoded[f"{name}_mask"]) for name in names}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer with reversed time on a list of images of one frame."""
        images = list(latents.unsqueeze(2).unbind(0))
        texts = _cut(prompt["prompt_embeds"], prompt["prompt_embeds_mask"])
        answer = self.denoiser(images, (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(answer)).squeeze(2)


class HiDream(FlowFamily):
    """HiDream: two CLIP text encoders (pooled), T5, and every layer of Llama 3, here (B, layers, T, width)."""

    pipeline = "HiDreamImagePipeline"
    encodings = (
        *("prompt_embeds_t5", "negative_prompt_embeds_t5", "prompt_embeds_llama3", "negative_prompt_embeds_llama3"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")

    def prepare_denoiser(self) -> None:
        """Make the transformer return images in training too, where it would return patches."""
        self.pipe.transformer.register_to_config(force_inference_output=True)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with all text encoders."""
        return self._batch_first(super().encode(prompts, guided))

    def generate(self, pipe: Any, encoded: Encoded, height: int, width: int, **settings: Any) -> Tensor:
        """Sample pictures of this size: by itself the pipeline scales it to the area of its default."""
        pipe.default_sample_size = (height * width * (1 + 1e-6)) ** 0.5 / pipe.vae_scale_factor
        return super().generate(pipe, encoded, height, width, **settings)

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Put the layers of Llama first."""
        return self._batch_first(encoded)

    def _batch_first(self, encoded: Encoded) -> Encoded:
        return {name: x.transpose(0, 1) if name.endswith("llama3") else x for name, x in encoded.items()}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer."""
        return -self.denoiser(
            hidden_states=latents,
            timesteps=timesteps,
            encoder_hidden_states_t5=prompt["prompt_embeds_t5"],
            encoder_hidden_states_llama3=prompt["prompt_embeds_llama3"].transpose(0, 1),
            pooled_embeds=prompt["pooled_prompt_embeds"],
        ).sample


def _cut(texts: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the texts (T, width) without padding."""
    return [text[: int(length)] for text, length in zip(texts, mask.sum(1).tolist(), strict=True)]
