"""Video pipelines, trained on images as videos of one frame: Wan and LTX."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import MASKED, Encoded, full_precision, named, present
from randlora_vision.training.dreambooth.families.flow import FlowFamily
from randlora_vision.training.dreambooth.families.statistics import StatisticsOfVAE


class Wan(StatisticsOfVAE, FlowFamily):
    """Wan 2.1, and 2.2 with one transformer."""

    pipeline = "WanPipeline"
    sampling: ClassVar[Mapping[str, Any]] = {"num_frames": 1}

    def __init__(self, pipe: Any, *options: Any) -> None:
        if pipe.config.boundary_ratio is not None:
            raise ValueError(
                "this WanPipeline has two transformers, one for each part of the noise levels, and only pipelines with "
                "one can be trained (Wan 2.1, Wan 2.2 TI2V-5B)"
            )
        super().__init__(pipe, *options)

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and the patches of the transformer."""
        config: Any = self.denoiser.config
        return int(self.pipe.vae_scale_factor_spatial) * int(config.patch_size[-1])

    @property
    def default_resolution(self) -> int:
        """The height that the pipeline generates by default."""
        return 480

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with UMT5."""
        found, negative = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=guided, device=self.device, **self.text_options
        )
        return present(prompt_embeds=found, negative_prompt_embeds=negative)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer on one frame; Wan 2.2 TI2V takes a timestep per token."""
        if self.pipe.config.expand_timesteps:
            tokens = (latents.shape[2] // 2) * (latents.shape[3] // 2)
            timesteps = timesteps[:, None].expand(-1, tokens)
        answer = self.denoiser(
            hidden_states=latents.unsqueeze(2), timestep=timesteps, encoder_hidden_states=prompt["prompt_embeds"]
        ).sample
        return answer[:, :, 0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, h, w) between 0 and 1, float32."""
        return frame(self, latents)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return the latents of the only frame."""
        return latents[:, :, 0]


class LTX(FlowFamily):
    """LTX-Video: T5, and one token per place of the latents."""

    pipeline = "LTXPipeline"
    sampling: ClassVar[Mapping[str, Any]] = {"num_frames": 1}
    normalised = True

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and the patches of the transformer."""
        return int(self.pipe.vae_spatial_compression_ratio) * int(self.pipe.transformer_spatial_patch_size)

    @property
    def default_resolution(self) -> int:
        """The height that the pipeline generates by default."""
        return 512

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the masks of the tokens."""
        found = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=guided, device=self.device, **self.text_options
        )
        return named(MASKED, found)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        height, width = latents.shape[2:]
        spatial, temporal = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents.unsqueeze(2), *self._patches),
            encoder_hidden_states=prompt["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=prompt["prompt_attention_mask"],
            num_frames=1,
            height=height,
            width=width,
            rope_interpolation_scale=(temporal / 25, spatial, spatial),  # 25 frames per second, as in the pipeline
        ).sample
        return self.unpack(answer, height * spatial, width * spatial)

    @property
    def patch_area(self) -> int:
        """The area of the transformer's patches."""
        return int(self.pipe.transformer_spatial_patch_size) ** 2

    @property
    def _patches(self) -> tuple[int, int]:
        return self.pipe.transformer_spatial_patch_size, self.pipe.transformer_temporal_patch_size

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline."""
        side = self.pipe.vae_spatial_compression_ratio
        unpacked: Tensor = self.pipe._unpack_latents(latents, 1, height // side, width // side, *self._patches)
        return unpacked[:, :, 0]

    moments = StatisticsOfVAE.moments

    def normalise(self, latents: Tensor) -> Tensor:
        """Apply the statistics and the scale of the VAE."""
        return self.pipe._normalize_latents(latents.unsqueeze(2), *self._statistics)[:, :, 0]

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        return self.pipe._denormalize_latents(latents.unsqueeze(2), *self._statistics)[:, :, 0]

    @property
    def _statistics(self) -> tuple[Tensor, Tensor, float]:
        vae = self.pipe.vae
        return vae.latents_mean, vae.latents_std, vae.config.scaling_factor

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode videos of one frame; a VAE that denoises gets the timestep 0, the default of the pipeline."""
        vae = self.pipe.vae
        clean = torch.zeros(len(latents), device=latents.device) if vae.config.timestep_conditioning else None
        return vae.decode(latents.unsqueeze(2), clean, return_dict=False)[0][:, :, 0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, h, w) between 0 and 1, float32."""
        return frame(self, latents)


def frame(family: FlowFamily, latents: Tensor) -> Tensor:
    """Return the only frames (B, 3, h, w) of videos, between 0 and 1; latents are those of the denoiser."""
    with full_precision(family.device):
        pixels = family.decode_raw(family.denormalise(latents.float()))
        return family.pipe.video_processor.postprocess(pixels, output_type="pt")
