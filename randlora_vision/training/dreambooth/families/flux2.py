"""Flux.2 and Flux.2 klein, which have another text encoder, and guidance inside or outside of the transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import Encoded
from randlora_vision.training.dreambooth.families.flow import FlowFamily


class Flux2(FlowFamily):
    """Flux.2: Mistral 3, built-in guidance; latents are packed two by two before the VAE's statistics scale them.

    Latents are (B, 4 C, H / 2, W / 2) here for C channels of the VAE.
    """

    pipeline = "Flux2Pipeline"
    packing = 4

    @property
    def patch_area(self) -> int:
        """One, as latents are packed before."""
        return 1

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode the prompts; the transformer has guidance built in and needs no negative prompt."""
        return {"prompt_embeds": self._text(prompts)}

    def _text(self, prompts: Sequence[str]) -> Tensor:
        found: Tensor = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, **self.text_options)[0]
        return found

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer on one token per place."""
        text = prompt["prompt_embeds"]
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents),
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            guidance=self.guidance(len(latents)),
            encoder_hidden_states=text,
            txt_ids=self.pipe._prepare_text_ids(text).to(latents.device),
            img_ids=self.pipe._prepare_latent_ids(latents).to(latents.device),
        ).sample
        return answer.transpose(1, 2).reshape(latents.shape)

    def normalise(self, latents: Tensor) -> Tensor:
        """Pack the latents two by two and give every channel mean 0 and variance 1."""
        mean, std = self._statistics(latents)
        return (self.pipe._patchify_latents(latents) - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        mean, std = self._statistics(latents)
        return self.pipe._unpatchify_latents(latents * std + mean)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean, variance = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, vae.bn.running_var))
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return tokens as a grid."""
        side = self.size_multiple
        return latents.transpose(1, 2).reshape(len(latents), -1, height // side, width // side)


class Flux2Klein(Flux2):
    """Flux.2 klein: Qwen3, and classifier-free guidance unless it is distilled."""

    pipeline = "Flux2KleinPipeline"

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also encode the empty prompt if `guided`."""
        found = {"prompt_embeds": self._text(prompts)}
        if guided and not self.pipe.config.is_distilled:
            found["negative_prompt_embeds"] = self._text([""] * len(prompts))
        return found

    def guidance(self, count: int) -> None:
        """Return None, as the pipeline gives the transformer no guidance."""

    def sampled(self, output: Tensor, height: int, width: int) -> Tensor:
        """Return latents of the VAE, which this pipeline outputs, as the transformer takes them."""
        return self.normalise(output)
