"""VAEs of videos, whose latents have a mean and a standard deviation per channel: Qwen-Image, Wan and others."""

from typing import Any

import torch
from torch import Tensor


class StatisticsOfVAE:
    """Latents that are normalised with a mean and a standard deviation per channel."""

    normalised = True
    pipe: Any

    @property
    def latent_channels(self) -> int:
        """The number of channels of the latents of the VAE."""
        return int(self.pipe.vae.config.z_dim)

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents of mean 0 and variance 1."""
        return (latents - self._per_channel("latents_mean", latents)) / self._per_channel("latents_std", latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        return latents * self._per_channel("latents_std", latents) + self._per_channel("latents_mean", latents)

    def _per_channel(self, name: str, latents: Tensor) -> Tensor:
        return torch.tensor(self.pipe.vae.config[name]).view(1, -1, *(1,) * (latents.ndim - 2)).to(latents)
