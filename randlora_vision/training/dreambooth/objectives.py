"""Training objectives of denoisers: noise levels, noisy latents, targets, and the weight of each error.

There are two objectives: noise prediction (Stable Diffusion 1.5, 2, XL) and flow matching (Stable Diffusion 3, Flux).
Schedulers, timestep densities and weightings come from diffusers; options have the names of diffusers' and kohya's
scripts, and their meaning.

Shapes: B images, C channels, latents of size H x W.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.experts import EXPERTS, places_of_experts
from randlora_vision.training.dreambooth.noise import Noise
from randlora_vision.training.option_fields import ABOVE_0, AT_LEAST_0, PART, RARE, Options, flag

WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
LossType = Literal["l2", "l1", "huber", "smooth_l1"]


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """The training objective of the denoiser."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = field(default=None, metadata=RARE)
    """Noise prediction: what the denoiser predicts, for a pipeline whose scheduler says it wrongly. Default: what the
    scheduler says."""
    snr_gamma: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Noise prediction: gamma of the min-SNR weighting of timesteps (usually 5.0; arXiv 2303.09556)."""
    debiased_estimation_loss: bool = field(default=False, metadata=RARE)
    """Noise prediction: weight the errors by 1 / sqrt(SNR), or 1 / (SNR + 1) for velocities (arXiv 2310.08442)."""
    noise_offset: float = field(default=0.0, metadata=RARE | AT_LEAST_0)
    """Noise prediction: add this times a random number per image and channel to the noise, for darker and brighter
    pictures (usually 0.05 to 0.1)."""
    input_perturbation: float = field(default=0.0, metadata=RARE | AT_LEAST_0)
    """Noise prediction: perturb the noise in the input of the denoiser, but not in its target, by this times other
    noise (usually 0.1; arXiv 2301.11706)."""
    loss_type: LossType = field(default="l2", metadata=RARE)
    """The error between prediction and target: its square, its absolute value, or the pseudo-Huber losses 2 c
    (sqrt(e^2 + c^2) - c), which is the square for small errors, and the same without the first c."""
    huber_c: float = field(default=0.1, metadata=RARE | PART)
    """The c of the Huber losses, at the noisiest timestep for a schedule."""
    huber_schedule: Literal["snr", "exponential", "constant"] | None = field(default=None, metadata=RARE)
    """How c falls from 1 with the timestep. Default: snr, or exponential for flow matching."""
    huber_scale: float = field(default=1.0, metadata=RARE | ABOVE_0)
    """Multiplies c for the schedules exponential and constant."""
    weighting_scheme: WeightingScheme = field(default="logit_normal", metadata=RARE)
    """Flow matching: how noise levels are drawn (logit_normal, mode) or weighted (sigma_sqrt, cosmap)."""
    logit_mean: float = field(default=0.0, metadata=RARE)
    """Mean of logit_normal."""
    logit_std: float = field(default=1.0, metadata=RARE | ABOVE_0)
    """Standard deviation of logit_normal."""
    mode_scale: float = field(default=1.29, metadata=RARE)
    """Scale of mode."""
    discrete_flow_shift: str | None = field(default=None, metadata=RARE)
    """Flow matching: shift of the noise levels t to s t / (1 + (s - 1) t): the number s, or 'resolution' for the
    one that the scheduler's settings give for the size of an image. Default: the shift of the scheduler."""
    expert: Literal["high-noise", "low-noise"] | None = field(default=None, metadata=RARE)
    """For a pipeline of two transformers, for high and for low noise (Wan 2.2): adapt this one alone, at its noise
    levels. Default: both, each at its own levels for half of the samples."""
    guidance_scale: float = field(default=3.5, metadata=RARE)
    """Guidance scale given to a guidance-distilled transformer (Flux.1, Flux.2) during training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise ValueError("--snr-gamma and --debiased-estimation-loss both weight the timesteps: give only one")
        self.flow_shift  # noqa: B018  # raises

    @property
    def flow_shift(self) -> float | Literal["resolution"] | None:
        """`discrete_flow_shift` as a number, if it is one."""
        text = self.discrete_flow_shift
        if text is None or text == "resolution":
            return None if text is None else "resolution"
        try:
            shift = float(text)
        except ValueError:
            shift = math.nan
        if not 0 < shift < math.inf:
            raise ValueError(f"--discrete-flow-shift must be a number above 0 or 'resolution', got {text!r}")
        return shift

    def require_defaults(self, names: tuple[str, ...], objective: str) -> None:
        """Raise ValueError if an option that `objective` does not have was given."""
        for member in fields(self):
            if member.name in names and getattr(self, member.name) != member.default:
                what = f"{flag(member.name)} has no meaning for this pipeline"
                raise ValueError(f"{what}, which is trained by {objective}")


@dataclass(frozen=True)
class Noised:
    """A batch at random noise levels."""

    latents: Tensor
    """The noisy latents that the denoiser gets as input (B, C, H, W), or those of clips (B, C, F, H, W)."""
    timesteps: Tensor
    """The timesteps that the denoiser gets as input (B,)."""
    target: Tensor
    """The target of the prediction (B, C, H, W)."""
    weight: Tensor
    """The weight of the error of each image (B,)."""
    huber_c: Tensor
    """The c of a Huber loss for each image (B,)."""

    def errors(self, answer: Tensor, loss_type: LossType) -> Tensor:
        """Return the unweighted error of a prediction in every latent (B, C, H, W), float32."""
        difference = answer.float() - self.target
        if loss_type == "l2":
            return difference.square()
        if loss_type == "l1":
            return difference.abs()
        c = _per_item(self.huber_c, difference)
        pseudo = 2 * ((difference.square() + c.square()).sqrt() - c)
        return c * pseudo if loss_type == "huber" else pseudo


class Objective(Protocol):
    """A rule that adds noise to latents."""

    def __call__(self, latents: Tensor, noise: Noise | None = None) -> Noised:
        """Add noise to clean latents (B, C, H, W), float32; by default from the current random state of PyTorch."""


class NoisePrediction:
    """The denoiser predicts the noise (epsilon) or the velocity (v_prediction), depending on its scheduler."""

    def __init__(self, scheduler: Any, options: ObjectiveOptions) -> None:
        from diffusers import DDPMScheduler

        if "beta_schedule" not in scheduler.config:
            raise ValueError(f"the noise schedule of {type(scheduler).__name__} is not supported: it has no betas")
        options.require_defaults(_OF_FLOW, "noise prediction")
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the scheduler's prediction_type is {self.kind!r}, but it must be epsilon or v_prediction"
            )
        self.options = options
        self.weights = self._weights()
        self.huber = self._huber()

    def __call__(self, latents: Tensor, noise: Noise | None = None) -> Noised:
        """Add noise to the latents at uniformly drawn timesteps."""
        noise = noise or Noise(len(latents))
        options, device, (channels, *size) = self.options, latents.device, latents.shape[1:]
        steps = self.scheduler.config.num_train_timesteps
        added = noise.normal((channels, *size), device)
        if options.noise_offset:
            added = added + options.noise_offset * noise.normal((channels, 1, 1), device)
        perturbed = added
        if options.input_perturbation:
            perturbed = added + options.input_perturbation * noise.normal((channels, *size), device)
        timesteps = noise.each(lambda count, generator: torch.randint(steps, (count,), generator=generator))
        weight, huber_c, timesteps = (
            values.to(device) for values in (self.weights[timesteps], self.huber[timesteps], timesteps)
        )
        noisy = self.scheduler.add_noise(latents, perturbed, timesteps)
        epsilon = self.kind == "epsilon"
        target = added if epsilon else self.scheduler.get_velocity(latents, added, timesteps)
        return Noised(noisy, timesteps, target, weight, huber_c)

    def _weights(self) -> Tensor:
        """Return the weight of each timestep.

        min-SNR: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for velocity. At zero terminal SNR, the former has the
        limit 1, and 1 / sqrt(SNR) is taken at the SNR of 1/1000.
        """
        from diffusers.training_utils import compute_snr

        options, epsilon = self.options, self.kind == "epsilon"
        snr = compute_snr(self.scheduler, torch.arange(self.scheduler.config.num_train_timesteps))
        if options.snr_gamma is not None:
            gamma = torch.tensor(options.snr_gamma)
            return (gamma / snr).clamp(max=1) if epsilon else torch.minimum(snr, gamma) / (snr + 1)
        if options.debiased_estimation_loss:
            snr = snr.clamp(1 / _MOST_SNR, _MOST_SNR)
            return snr.rsqrt() if epsilon else 1 / (snr + 1)
        return torch.ones_like(snr)

    def _huber(self) -> Tensor:
        """Return the c of Huber losses for each timestep."""
        options, alphas = self.options, self.scheduler.alphas_cumprod
        if options.huber_schedule in (None, "snr"):
            ratio = ((1 - alphas) / alphas).sqrt()  # infinite at zero terminal SNR, where c is the smallest
            return (1 - options.huber_c) / (1 + ratio).square() + options.huber_c
        return _huber(options, torch.arange(len(alphas)), len(alphas))


class FlowMatching:
    """The denoiser predicts the velocity, noise - latents, on the straight line between latents and noise."""

    def __init__(
        self, scheduler: Any, options: ObjectiveOptions, patch_area: int = 4, boundary: float | None = None
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        options.require_defaults(_OF_NOISE, "flow matching")
        if options.huber_schedule == "snr":
            raise ValueError("--huber-schedule snr is for noise prediction: give exponential or constant")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.options = options
        self.patch_area = patch_area  # places of the latents in one token
        self.boundary = boundary  # the first timestep of the expert for high noise, if there are two

    def __call__(self, latents: Tensor, noise: Noise | None = None) -> Noised:
        """Add noise at levels drawn by the weighting scheme and shifted."""
        from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

        noise = noise or Noise(len(latents))
        options, device = self.options, latents.device
        steps = self.scheduler.config.num_train_timesteps
        added = noise.normal(latents.shape[1:], device)
        density = noise.each(
            lambda count, generator: compute_density_for_timestep_sampling(
                options.weighting_scheme,
                count,
                options.logit_mean,
                options.logit_std,
                options.mode_scale,
                generator=generator,
            )
        )
        area = latents[0, 0].numel()
        index = (density * steps).long().clamp(max=steps - 1)
        if self.boundary is not None:
            chosen = noise.each(lambda count, generator: torch.randint(2, (count,), generator=generator))
            if options.expert is not None:
                chosen = torch.full_like(chosen, EXPERTS.index(options.expert))
            index = places_of_experts(self._levels(torch.arange(steps), area)[1], self.boundary, chosen, density)
        sigma, timesteps = self._levels(index, area)
        sigma, timesteps = sigma.to(device), timesteps.to(device)
        amount = _per_item(sigma, latents)
        noisy = (1 - amount) * latents + amount * added
        weight = compute_loss_weighting_for_sd3(options.weighting_scheme, sigma)
        return Noised(noisy, timesteps, added - latents, weight, _huber(options, timesteps, steps))

    def _levels(self, index: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """Return the noise levels and timesteps (B,) at places in the schedule, for latents of so many places."""
        shift, config = self.options.flow_shift, self.scheduler.config
        if shift is None:
            return self.scheduler.sigmas[index].float(), self.scheduler.timesteps[index]
        if shift == "resolution":
            tokens = area // self.patch_area
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        level = 1 - index / config.num_train_timesteps
        sigma = shift * level / (1 + (shift - 1) * level)
        return sigma, sigma * config.num_train_timesteps


def _per_item(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) in the shape (B, 1, ...) of as many dimensions as another tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


_OF_NOISE = ("prediction_type", "snr_gamma", "debiased_estimation_loss", "noise_offset", "input_perturbation")
_OF_FLOW = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "discrete_flow_shift")
_MOST_SNR = 1000.0  # kohya's bound, where SNR is infinite


def _huber(options: ObjectiveOptions, timesteps: Tensor, steps: int) -> Tensor:
    """Return c for timesteps (B,) by a schedule that does not depend on the noise schedule."""
    if options.huber_schedule == "constant":
        return torch.full(timesteps.shape, options.huber_c * options.huber_scale, device=timesteps.device)
    return options.huber_scale * options.huber_c ** (timesteps / steps)


def scheduler_for(scheduler: Any, options: ObjectiveOptions) -> Any:
    """Return the scheduler of a pipeline, or one that predicts what the options say, for training and sampling."""
    if options.prediction_type in (None, scheduler.config.get("prediction_type")):
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type=options.prediction_type)
