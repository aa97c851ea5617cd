"""What a denoiser is taught: noise levels, the noisy latents, the target, and the weight of every image's error.

Two kinds are known, noise prediction (Stable Diffusion 1.5, 2, XL) and flow matching (Stable Diffusion 3,
Flux). Schedulers, timestep densities and weightings are diffusers' own.

Shapes: B images, C channels, H x W of latents.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


@dataclass(frozen=True)
class ObjectiveOptions:
    """What the denoiser is taught."""

    snr_gamma: float | None = None
    """Noise prediction: weigh timesteps by min-SNR with this gamma (5.0 is usual; arXiv 2303.09556)."""
    weighting_scheme: WeightingScheme = "logit_normal"
    """Flow matching: how noise levels are drawn (logit_normal, mode) or weighed (sigma_sqrt, cosmap)."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    guidance_scale: float = 3.5
    """Flux: what a guidance-distilled transformer is told in training."""

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"--snr-gamma must be above 0, got {self.snr_gamma}")
        if self.logit_std <= 0:
            raise ValueError(f"--logit-std must be above 0, got {self.logit_std}")


@dataclass(frozen=True)
class Noised:
    """A batch at random noise levels."""

    latents: Tensor
    """What the denoiser sees (B, C, H, W)."""
    timesteps: Tensor
    """What it is told of the noise level (B,)."""
    target: Tensor
    """What it should answer (B, C, H, W)."""
    weight: Tensor
    """Of each image's squared error (B,)."""


class Objective(Protocol):
    """Draws noise and noise levels from PyTorch's current random state."""

    def __call__(self, latents: Tensor) -> Noised:
        """Noise clean latents (B, C, H, W), float32."""


class NoisePrediction:
    """The denoiser answers the noise (epsilon) or the velocity (v_prediction), as its scheduler says."""

    def __init__(self, scheduler: Any, options: ObjectiveOptions) -> None:
        from diffusers import DDPMScheduler

        if "beta_schedule" not in scheduler.config:
            raise ValueError(f"the noise schedule of {type(scheduler).__name__} is of no known kind (it has no betas)")
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the scheduler's prediction_type is {self.kind!r}: epsilon and v_prediction are known")
        self.gamma = options.snr_gamma

    def __call__(self, latents: Tensor) -> Noised:
        """Noise the latents at timesteps drawn uniformly."""
        steps = self.scheduler.config.num_train_timesteps
        noise = torch.randn_like(latents)
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        epsilon = self.kind == "epsilon"
        target = noise if epsilon else self.scheduler.get_velocity(latents, noise, timesteps)
        return Noised(noisy, timesteps, target, self._weight(timesteps, epsilon))

    def _weight(self, timesteps: Tensor, epsilon: bool) -> Tensor:
        """Min-SNR: min(SNR, gamma) over what the plain squared error amounts to, SNR or SNR + 1."""
        from diffusers.training_utils import compute_snr

        if self.gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        weight: Tensor = snr.clamp(max=self.gamma) / (snr if epsilon else snr + 1)
        return weight


class FlowMatching:
    """The denoiser answers the velocity noise - latents on the straight line between the two."""

    def __init__(self, scheduler: Any, options: ObjectiveOptions) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.options = options

    def __call__(self, latents: Tensor) -> Noised:
        """Noise the latents at levels drawn as the weighting scheme says, the scheduler's shift included."""
        from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

        options, device = self.options, latents.device
        steps = self.scheduler.config.num_train_timesteps
        noise = torch.randn_like(latents)
        density = compute_density_for_timestep_sampling(
            options.weighting_scheme,
            len(latents),
            options.logit_mean,
            options.logit_std,
            options.mode_scale,
            device=device,
        )
        index = (density * steps).long().clamp(max=steps - 1)
        sigma = self.scheduler.sigmas.to(device)[index].float()
        timesteps = self.scheduler.timesteps.to(device)[index]
        amount = sigma.view(-1, 1, 1, 1)
        noisy = (1 - amount) * latents + amount * noise
        weight = compute_loss_weighting_for_sd3(options.weighting_scheme, sigma)
        return Noised(noisy, timesteps, noise - latents, weight)
