"""VAEs of videos, whose latents have a mean and a standard deviation per channel: Qwen-Image, Wan and others."""

from typing import Any

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import full_precision


class StatisticsOfVAE:
    """Latents that are normalised with a mean and a standard deviation per channel, and have one frame."""

    normalised = True
    pipe: Any
    device: torch.device

    @property
    def latent_channels(self) -> int:
        """The number of channels of the latents of the VAE."""
        return int(self.pipe.vae.config.z_dim)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Encode images as videos of one frame."""
        with full_precision(self.device):
            frames = pixels.to(self.device, torch.float32).unsqueeze(2)
            moments: Tensor = self.pipe.vae.encode(frames).latent_dist.parameters
            return moments[:, :, 0].contiguous()

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode videos of one frame."""
        return self.pipe.vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents of mean 0 and variance 1."""
        return (latents - self._per_channel("latents_mean", latents)) / self._per_channel("latents_std", latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        return latents * self._per_channel("latents_std", latents) + self._per_channel("latents_mean", latents)

    def _per_channel(self, name: str, latents: Tensor) -> Tensor:
        return torch.tensor(self.pipe.vae.config[name]).view(1, -1, 1, 1).to(latents)
