"""Video pipelines, trained on clips, of which an image is one of a single frame: Wan and LTX."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.training.dreambooth.experts import EXPERTS
from randlora_vision.training.dreambooth.families.base import MASKED, Encoded
from randlora_vision.training.dreambooth.families.flow import FlowFamily
from randlora_vision.training.dreambooth.families.precision import full_precision
from randlora_vision.training.dreambooth.families.statistics import StatisticsOfVAE


class Video(FlowFamily):
    """A family of videos: latents have frames (B, C, F, H, W), also those of an image."""

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log variance of the latents (B, 2 C, F, H, W) of clips (B, 3, f, h, w) or images."""
        with full_precision(self.device):
            clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
            moments: Tensor = self.pipe.vae.encode(clips.to(self.device, torch.float32)).latent_dist.parameters
            return moments.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return clips (B, 3, f, h, w), or images (B, 3, h, w) for a single frame, between 0 and 1, float32."""
        with full_precision(self.device):
            pixels = self.decode_raw(self.denormalise(latents.float()))
            clips = self.pipe.video_processor.postprocess_video(pixels, output_type="pt").transpose(1, 2)
            return clips[:, :, 0] if clips.shape[2] == 1 else clips

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Also give the number of frames."""
        return {**encoded, "num_frames": self.num_frames}


class Wan(StatisticsOfVAE, Video):
    """Wan 2.1 and 2.2: one transformer, or two experts, `transformer` for the noise levels from a boundary on."""

    pipeline = "WanPipeline"
    frame_rate = 16  # at which all were trained but 2.2 TI2V, at 24

    def __init__(self, pipe: Any, *options: Any) -> None:
        super().__init__(pipe, *options)
        if pipe.config.expand_timesteps:
            self.frame_rate = 24
        self.frames_per_latent = int(pipe.vae_scale_factor_temporal)

    @classmethod
    def denoisers_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return both experts if there is a boundary between them."""
        return ("transformer", "transformer_2") if config.get("boundary_ratio") is not None else ("transformer",)

    @property
    def trained_denoisers(self) -> tuple[str, ...]:
        """Both experts, or the one that the options name."""
        both = super().trained_denoisers
        return both if self.options.expert is None else (both[EXPERTS.index(self.options.expert)],)

    @property
    def boundary(self) -> float | None:
        """The timestep at which the pipeline changes the expert."""
        ratio: float | None = self.pipe.config.boundary_ratio
        return None if ratio is None else ratio * self.pipe.scheduler.config.num_train_timesteps

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and the patches of the transformer."""
        config: Any = self.denoiser.config
        return int(self.pipe.vae_scale_factor_spatial) * int(config.patch_size[-1])

    @property
    def default_resolution(self) -> int:
        """The height that the pipeline generates by default."""
        return 480

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer, or the experts, each with its items; Wan 2.2 TI2V takes a timestep per token."""
        if self.boundary is None:
            return self._of_one(self.denoiser, latents, timesteps, prompt["prompt_embeds"])
        high = timesteps >= self.boundary
        places = [part.nonzero()[:, 0] for part in (high, ~high)]
        answers = [
            self._of_one(expert, latents[own], timesteps[own], prompt["prompt_embeds"][own])
            for expert, own in zip(self.denoisers.values(), places, strict=True)
            if len(own)
        ]
        return torch.cat(answers)[torch.cat(places).argsort()]

    def _of_one(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        if self.pipe.config.expand_timesteps:
            frames, height, width = latents.shape[2:]
            timesteps = timesteps[:, None].expand(-1, frames * (height // 2) * (width // 2))
        answer: Tensor = transformer(hidden_states=latents, timestep=timesteps, encoder_hidden_states=text).sample
        return answer


class LTX(Video):
    """LTX-Video: T5, and one token per place of the latents."""

    pipeline = "LTXPipeline"
    encodings = MASKED
    normalised = True
    frame_rate = 25  # the default of the pipeline, which conditions on it

    def __init__(self, pipe: Any, *options: Any) -> None:
        super().__init__(pipe, *options)
        self.frames_per_latent = int(pipe.vae_temporal_compression_ratio)

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and the patches of the transformer."""
        return int(self.pipe.vae_spatial_compression_ratio) * int(self.pipe.transformer_spatial_patch_size)

    @property
    def default_resolution(self) -> int:
        """The height that the pipeline generates by default."""
        return 512

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        frames, height, width = latents.shape[2:]
        spatial, temporal = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents, *self._patches),
            encoder_hidden_states=prompt["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=prompt["prompt_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(temporal / self.frame_rate, spatial, spatial),
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
        height, width = (side // self.pipe.vae_spatial_compression_ratio for side in (height, width))
        frames = latents.shape[1] // (height * width)
        unpacked: Tensor = self.pipe._unpack_latents(latents, frames, height, width, *self._patches)
        return unpacked

    def normalise(self, latents: Tensor) -> Tensor:
        """Apply the statistics and the scale of the VAE."""
        normalised: Tensor = self.pipe._normalize_latents(latents, *self._statistics)
        return normalised

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        plain: Tensor = self.pipe._denormalize_latents(latents, *self._statistics)
        return plain

    @property
    def _statistics(self) -> tuple[Tensor, Tensor, float]:
        vae = self.pipe.vae
        return vae.latents_mean, vae.latents_std, vae.config.scaling_factor

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Return the clips of latents; a VAE that denoises gets the timestep 0, the default of the pipeline."""
        vae = self.pipe.vae
        clean = torch.zeros(len(latents), device=latents.device) if vae.config.timestep_conditioning else None
        clips: Tensor = vae.decode(latents, clean, return_dict=False)[0]
        return clips
