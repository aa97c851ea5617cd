"""Training objectives of denoisers: noise levels, noisy latents, targets, and the weight of each error.

There are two objectives: noise prediction (Stable Diffusion 1.5, 2, XL) and flow matching (Stable Diffusion 3, Flux).
Schedulers, timestep densities and weightings come from diffusers.

Shapes: B images, C channels, latents of size H x W.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


@dataclass(frozen=True)
class ObjectiveOptions:
    """The training objective of the denoiser."""

    snr_gamma: float | None = None
    """Noise prediction: gamma of the min-SNR weighting of timesteps (usually 5.0; arXiv 2303.09556)."""
    weighting_scheme: WeightingScheme = "logit_normal"
    """Flow matching: how noise levels are drawn (logit_normal, mode) or weighted (sigma_sqrt, cosmap)."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    guidance_scale: float = 3.5
    """Flux: guidance scale given to a guidance-distilled transformer during training."""

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"--snr-gamma must be above 0, got {self.snr_gamma}")
        if self.logit_std <= 0:
            raise ValueError(f"--logit-std must be above 0, got {self.logit_std}")


@dataclass(frozen=True)
class Noised:
    """A batch at random noise levels."""

    latents: Tensor
    """The noisy latents that the denoiser gets as input (B, C, H, W)."""
    timesteps: Tensor
    """The timesteps that the denoiser gets as input (B,)."""
    target: Tensor
    """The target of the prediction (B, C, H, W)."""
    weight: Tensor
    """The weight of the squared error of each image (B,)."""


class Objective(Protocol):
    """A rule that adds noise to latents, drawn from the current random state of PyTorch."""

    def __call__(self, latents: Tensor) -> Noised:
        """Add noise to clean latents (B, C, H, W), float32."""


class NoisePrediction:
    """The denoiser predicts the noise (epsilon) or the velocity (v_prediction), depending on its scheduler."""

    def __init__(self, scheduler: Any, options: ObjectiveOptions) -> None:
        from diffusers import DDPMScheduler

        if "beta_schedule" not in scheduler.config:
            raise ValueError(f"the noise schedule of {type(scheduler).__name__} is not supported: it has no betas")
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the scheduler's prediction_type is {self.kind!r}, but it must be epsilon or v_prediction"
            )
        self.gamma = options.snr_gamma

    def __call__(self, latents: Tensor) -> Noised:
        """Add noise to the latents at uniformly drawn timesteps."""
        steps = self.scheduler.config.num_train_timesteps
        noise = torch.randn_like(latents)
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        epsilon = self.kind == "epsilon"
        target = noise if epsilon else self.scheduler.get_velocity(latents, noise, timesteps)
        return Noised(noisy, timesteps, target, self._weight(timesteps, epsilon))

    def _weight(self, timesteps: Tensor, epsilon: bool) -> Tensor:
        """Return the min-SNR weights: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for velocity."""
        from diffusers.training_utils import compute_snr

        if self.gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        weight: Tensor = snr.clamp(max=self.gamma) / (snr if epsilon else snr + 1)
        return weight


class FlowMatching:
    """The denoiser predicts the velocity, noise - latents, on the straight line between latents and noise."""

    def __init__(self, scheduler: Any, options: ObjectiveOptions) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.options = options

    def __call__(self, latents: Tensor) -> Noised:
        """Add noise at levels drawn by the weighting scheme, including the shift of the scheduler."""
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
