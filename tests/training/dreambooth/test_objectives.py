"""Losses, weights and noise of the objectives, compared with closed forms and with diffusers' own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from randlora_vision.training.dreambooth.noise import Noise
from randlora_vision.training.dreambooth.objectives import (
    FlowMatching,
    NoisePrediction,
    ObjectiveOptions,
    scheduler_for,
)

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEEDS = list(range(256))
LATENTS = torch.linspace(-1, 1, 256 * 4 * 4).reshape(256, 1, 4, 4)


def noised(options: ObjectiveOptions, **scheduler: Any) -> Any:
    return NoisePrediction(DDPMScheduler(**{**SD, **scheduler}), options)(LATENTS, Noise(256, SEEDS))


def alphas(**scheduler: Any) -> torch.Tensor:
    return DDPMScheduler(**{**SD, **scheduler}).alphas_cumprod.double()


# Weights


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("options", [{"snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {}])
def test_the_weight_of_every_timestep(options: dict[str, Any], kind: str, zero: bool) -> None:
    scheduler = {"rescale_betas_zero_snr": zero, "prediction_type": kind}
    actual = NoisePrediction(DDPMScheduler(**SD, **scheduler), ObjectiveOptions(**options)).weights
    assert actual.isfinite().all() and (actual >= 0).all()
    a = alphas(rescale_betas_zero_snr=zero)
    snr = (a / (1 - a)).tolist()
    assert (snr[-1] == 0) == zero
    velocity = kind == "v_prediction"
    for step in (0, 1, 500, 900, 998, 999):
        if "snr_gamma" in options:  # the limit where SNR is zero: gamma has no say there
            expected = min(snr[step], 5.0) / (snr[step] + 1) if velocity else min(1.0, 5.0 / max(snr[step], 1e-30))
        elif options:
            bounded = min(max(snr[step], 1e-3), 1e3)
            expected = 1 / (bounded + 1) if velocity else 1 / math.sqrt(bounded)
        else:
            expected = 1.0
        assert actual[step].item() == pytest.approx(expected, rel=1e-3), step


# Losses


def test_huber_losses_have_their_limits() -> None:
    c, small, large = 0.1, 1e-3, 1e3
    values = noised(ObjectiveOptions(loss_type="huber", huber_schedule="constant", huber_c=c))
    offsets = torch.full_like(values.target, small)
    torch.testing.assert_close(values.errors(values.target + offsets, "huber"), offsets**2, rtol=2e-2, atol=0)
    torch.testing.assert_close(values.errors(values.target + offsets, "smooth_l1"), offsets**2 / c, rtol=2e-2, atol=0)
    far = values.errors(values.target + large, "huber")
    torch.testing.assert_close(far, torch.full_like(far, 2 * c * (large - c)), rtol=1e-4, atol=0)
    torch.testing.assert_close(values.errors(values.target - 0.3, "l1"), torch.full_like(far, 0.3))
    expected = 2 * c * (math.sqrt(0.3**2 + c**2) - c)
    torch.testing.assert_close(values.errors(values.target - 0.3, "huber"), torch.full_like(far, expected))


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedules_of_huber_losses(zero: bool) -> None:
    def c_of(schedule: Any, **options: Any) -> torch.Tensor:
        chosen = ObjectiveOptions(huber_schedule=schedule, huber_c=0.2, **options)
        return NoisePrediction(DDPMScheduler(**SD, rescale_betas_zero_snr=zero), chosen).huber.double()

    steps = torch.arange(1000).double()
    torch.testing.assert_close(c_of("exponential", huber_scale=3.0), 3 * 0.2 ** (steps / 1000), rtol=1e-5, atol=0)
    torch.testing.assert_close(c_of("constant", huber_scale=3.0), torch.full((1000,), 0.6).double())
    a = alphas(rescale_betas_zero_snr=zero)
    # (1 - c) / (1 + sigma)^2 + c with sigma = sqrt((1 - a) / a), written without the division by a
    expected = 0.8 * a / (a.sqrt() + (1 - a).sqrt()) ** 2 + 0.2
    torch.testing.assert_close(c_of("snr"), expected, rtol=1e-4, atol=0)
    assert torch.equal(c_of(None), c_of("snr"))
    flow = FlowMatching(FlowMatchEulerDiscreteScheduler(), ObjectiveOptions(huber_c=0.2))(LATENTS, Noise(256, SEEDS))
    torch.testing.assert_close(flow.huber_c, 0.2 ** (flow.timesteps / 1000))


# Noise


def test_offset_and_perturbed_noise() -> None:
    """The statistics of the noise, recovered from the noisy latents and from the target."""
    size = (256, 4, 8, 8)
    scheduler, latents = DDPMScheduler(**SD), torch.ones(size)
    plain, offset, perturbed = (
        NoisePrediction(scheduler, ObjectiveOptions(**options))(latents, Noise(256, SEEDS))
        for options in ({}, {"noise_offset": 0.5}, {"input_perturbation": 0.1})
    )

    def added(found: Any) -> torch.Tensor:
        a = alphas()[found.timesteps].view(-1, 1, 1, 1)
        return ((found.latents - a.sqrt()) / (1 - a).sqrt()).float()

    for found in (plain, offset):
        torch.testing.assert_close(added(found), found.target, rtol=0, atol=2e-3)
    moved = offset.target - plain.target  # the same in every pixel of a channel
    torch.testing.assert_close(moved, moved.mean((2, 3), keepdim=True).expand(size), rtol=0, atol=1e-5)
    assert moved.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(perturbed.target, plain.target)
    shaken = added(perturbed) - perturbed.target
    assert shaken.std().item() == pytest.approx(0.1, rel=0.02) and abs(shaken.mean()) < 1e-3


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_numbers_belong_to_the_sample_and_not_to_its_batch(scheme: Any) -> None:
    flow = FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0), ObjectiveOptions(weighting_scheme=scheme))
    options = ObjectiveOptions(noise_offset=0.1, input_perturbation=0.1)
    for objective in (flow, NoisePrediction(DDPMScheduler(**SD), options)):
        whole = objective(LATENTS, Noise(256, SEEDS))
        for start, count in ((0, 1), (7, 2), (32, 64)):
            part = slice(start, start + count)
            alone = objective(LATENTS[part], Noise(count, SEEDS[part]))
            for name in ("latents", "timesteps", "target", "weight"):
                assert torch.equal(getattr(alone, name), getattr(whole, name)[part]), name
        assert len(set(whole.timesteps.tolist())) > 100


def test_noise_levels_are_shifted() -> None:
    def levels(scheduler: Any, shift: str | None, size: int = 4) -> torch.Tensor:
        objective = FlowMatching(scheduler, ObjectiveOptions(discrete_flow_shift=shift))
        found = objective(torch.zeros(256, 1, size, size), Noise(256, SEEDS))
        sigma = found.timesteps / 1000
        noise = torch.cat([torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
        torch.testing.assert_close(found.latents, sigma.view(-1, 1, 1, 1) * noise)  # the level is what the model hears
        return sigma

    plain = levels(FlowMatchEulerDiscreteScheduler(), None)
    torch.testing.assert_close(levels(FlowMatchEulerDiscreteScheduler(shift=3.0), "1.0"), plain)
    for own, given in ((3.0, None), (1.0, "3.0"), (2.0, "3")):
        shifted = levels(FlowMatchEulerDiscreteScheduler(shift=own), given)
        torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-5, atol=1e-6)
    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    size = 96
    moved = levels(flux, "resolution", size)
    plain = levels(FlowMatchEulerDiscreteScheduler(), None, size)
    tokens = FluxPipeline._pack_latents(torch.zeros(1, 1, size, size), 1, 1, size, size).shape[1]
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    torch.testing.assert_close(moved, flux.time_shift(mu, 1.0, plain), rtol=1e-5, atol=1e-6)


# Options


def test_the_prediction_type_is_that_of_training_and_of_pictures() -> None:
    from diffusers import DDIMScheduler

    options = ObjectiveOptions(prediction_type="v_prediction")
    scheduler = scheduler_for(DDIMScheduler(**SD), options)
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "v_prediction"
    assert NoisePrediction(scheduler, options).kind == "v_prediction"
    same = DDIMScheduler(**SD, prediction_type="v_prediction")
    assert scheduler_for(same, options) is same and scheduler_for(same, ObjectiveOptions()) is same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_gamma": 5.0, "debiased_estimation_loss": True}, "give only one"),
        ({"noise_offset": -0.1}, "--noise-offset must be 0 or more"),
        ({"huber_c": 0.0}, "--huber-c must be above 0"),
        ({"discrete_flow_shift": "wide"}, "a number above 0 or 'resolution', got 'wide'"),
        ({"discrete_flow_shift": "inf"}, "--discrete-flow-shift must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**options)


@pytest.mark.parametrize(
    "options", [{"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"prediction_type": "epsilon"}, {"huber_schedule": "snr"}]
)
def test_flow_matching_refuses_options_of_noise_prediction(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("_", "-")):
        FlowMatching(FlowMatchEulerDiscreteScheduler(), ObjectiveOptions(**options))


@pytest.mark.parametrize("options", [{"weighting_scheme": "mode"}, {"discrete_flow_shift": "3"}])
def test_noise_prediction_refuses_options_of_flow_matching(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which is trained by noise prediction"):
        NoisePrediction(DDPMScheduler(**SD), ObjectiveOptions(**options))
