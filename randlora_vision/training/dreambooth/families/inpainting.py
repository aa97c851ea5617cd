"""Inpainting: denoisers that also take a mask and the latents of the image around it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora_vision.training.dreambooth.families.base import Encoded, Family
from randlora_vision.training.dreambooth.families.flux import Flux
from randlora_vision.training.dreambooth.families.stable_diffusion import SDXL


class Inpainting(Family):
    """Stable Diffusion 1.5 and 2 for inpainting: further channels of the latents are the mask and what is around it."""

    pipeline = "StableDiffusionInpaintPipeline"
    takes = "mask"
    sampling: ClassVar[Mapping[str, Any]] = {"strength": 1.0}  # pictures begin with noise alone, as in training

    @property
    def condition_channels(self) -> int:
        """One for the mask, and the channels of the latents."""
        return 1 + self.latent_channels

    def condition(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return the mask at the size of the latents, and the latents of the image with the masked part grey."""
        pixels, mask = pixels.to(self.device), given.to(self.device)
        around = self.mean_latents(pixels * (1 - mask))
        return torch.cat([F.interpolate(mask, around.shape[2:]), around], dim=1)

    def shown(self, pixels: Tensor, given: Tensor) -> dict[str, Any]:
        """Return the images, between 0 and 1, and their masks."""
        return {"image": (pixels + 1) / 2, "mask_image": given}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the denoiser with the condition beside the latents."""
        return super().predict(torch.cat([latents, prompt["condition"]], dim=1), timesteps, prompt, sizes)


class InpaintingXL(Inpainting, SDXL):
    """Stable Diffusion XL for inpainting."""

    pipeline = "StableDiffusionXLInpaintPipeline"


class FluxFill(Flux):
    """Flux.1 Fill: the tokens are longer by those of the image around the mask and by the pixels of the mask."""

    pipeline = "FluxFillPipeline"
    takes = "mask"

    @property
    def condition_channels(self) -> int:
        """The channels of the latents, and one for each pixel that a latent covers."""
        return self.latent_channels + int(self.pipe.vae_scale_factor) ** 2

    def condition(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return the latents of the image with the masked part grey, and the pixels of the mask as channels."""
        pixels, mask = pixels.to(self.device), given.to(self.device)
        around = self.mean_latents(pixels * (1 - mask))
        return torch.cat([around, F.pixel_unshuffle(mask, self.pipe.vae_scale_factor)], dim=1)

    shown = Inpainting.shown

    def tokens(self, latents: Tensor, prompt: Encoded) -> tuple[Tensor, Tensor]:
        """Return longer tokens, each the one of the latents, of the image around the mask and of the mask."""
        tokens, places = super().tokens(latents, prompt)
        around, mask = prompt["condition"].tensor_split([self.latent_channels], dim=1)
        return torch.cat([tokens, self.packed(around), self.packed(mask)], dim=2), places
