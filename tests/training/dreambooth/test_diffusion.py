"""Tests of the parts that train a pipeline: losses of every family, prompts, sizes, latents, samples."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch import Tensor, nn

from randlora_vision.training.dreambooth.batches import (
    CachedLatents,
    CaptionedPixels,
    DiffusionBatch,
    Item,
    Prompts,
    collate,
)
from randlora_vision.training.dreambooth.buckets import BucketBatches, fit, nearest_bucket, parse_buckets
from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.samples import Gallery, Sampler, as_image, largest_difference
from tests.tiny_pipelines import CONTEXT, PIPELINES, PIXELS

TEXTS = ["a photo of sks digit", "a photo of a digit", "sks"]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # of the tiny pipelines
ALPHAS = (1 - BETAS).cumprod(0).float()
SEEDS = [3, 1, 4, 15]
TWO_STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: make() for name, make in PIPELINES.items()}


def family_of(pipe: Any, **objective: Any) -> Family:
    return FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(**objective), CONTEXT)


def some_batch() -> DiffusionBatch:
    """Two items of the subject with captions 0 and 2, two of its class with caption 1."""
    torch.manual_seed(5)
    return DiffusionBatch(
        inputs=torch.rand(4, 3, PIXELS, PIXELS) * 2 - 1,
        masks=torch.ones(4, 1, 1, 1),
        seeds=torch.tensor(SEEDS),
        captions=torch.tensor([0, 2, 1, 1]),
        prior=torch.tensor([False, False, True, True]),
        sizes=torch.tensor(
            [[40, 30, 0, 0, 16, 16], [20, 20, 3, 5, 16, 16], [16, 16, 0, 0, 16, 16], [9, 9, 1, 1, 16, 16]]
        ),
    )


class EachItems:
    """Random numbers drawn for each item from its own seed, one call after the other."""

    def __init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def __call__(self, draw: Any, *size: int, **options: Any) -> Tensor:
        return torch.cat([draw(*options.values(), (1, *size), generator=g) for g in self.generators])


def draw_latents(pipe: Any, pixels: Tensor, each: EachItems) -> Tensor:
    """Return x = (mean + std * noise - shift) * scale, drawn from the distribution of the VAE."""
    config = pipe.vae.config
    found = pipe.vae.encode(pixels).latent_dist
    sampled = found.mean + found.std * each(torch.randn, *found.mean.shape[1:])
    return (sampled - (config.shift_factor or 0.0)) * config.scaling_factor


def clip_states(encoder: Any, tokenizer: Any, text: str) -> Any:
    ids = tokenizer(text, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    return encoder(ids, output_hidden_states=True)


def t5_states(encoder: Any, tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    return encoder(ids)[0]


def expected_noise_prediction(pipe: Any, batch: DiffusionBatch, gamma: float | None) -> Tensor:
    """Return the errors (B,) of SD1.5 and SDXL from the formulas of the papers, item by item."""
    each = EachItems()
    latents = draw_latents(pipe, batch["inputs"], each)
    noise = each(torch.randn, *latents.shape[1:])
    t = each(torch.randint, high=1000)
    a = ALPHAS[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if velocity else noise
    errors = []
    for i, place in enumerate(batch["captions"].tolist()):
        text = TEXTS[place]
        states = clip_states(pipe.text_encoder, pipe.tokenizer, text)
        condition: dict[str, Any] = {"encoder_hidden_states": states.last_hidden_state}
        if hasattr(pipe, "text_encoder_2"):
            second = clip_states(pipe.text_encoder_2, pipe.tokenizer_2, text)
            both = torch.cat([states.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            added = {"text_embeds": second.text_embeds, "time_ids": batch["sizes"][i : i + 1].float()}
            condition = {"encoder_hidden_states": both, "added_cond_kwargs": added}
        answer = pipe.unet(noisy[i : i + 1], t[i], **condition).sample
        error = (answer - target[i : i + 1]).square().mean()
        snr = (ALPHAS[t[i]] / (1 - ALPHAS[t[i]])).item()
        weight = 1.0 if gamma is None else min(snr, gamma) / (snr + 1 if velocity else snr)
        errors.append(weight * error)
    return torch.stack(errors)


def flux_packed(x: Tensor) -> Tensor:
    """Return 2 x 2 patches as tokens (B, H/2 * W/2, 4 C), channels varying slowest."""
    return nn.functional.unfold(x, kernel_size=2, stride=2).transpose(1, 2)


def expected_flow_matching(pipe: Any, batch: DiffusionBatch, density: Any, weigh: Any, guidance: float) -> Tensor:
    """Return the errors (B,) of SD3 and Flux: v = noise - x at x + sigma (noise - x)."""
    each = EachItems()
    latents = draw_latents(pipe, batch["inputs"], each)
    noise = each(torch.randn, *latents.shape[1:])
    index = (density(each) * 1000).long()
    sigma = (1000 - index) / 1000
    flux = type(pipe).__name__ == "FluxPipeline"
    errors = []
    for i, place in enumerate(batch["captions"].tolist()):
        text, s = TEXTS[place], sigma[i]
        noisy = ((1 - s) * latents + s * noise)[i : i + 1]
        first = clip_states(pipe.text_encoder, pipe.tokenizer, text)
        target = (noise - latents)[i : i + 1]
        if flux:
            side = noisy.shape[-1] // 2
            rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            ids = torch.stack([torch.zeros(side, side), rows, columns], dim=-1).view(-1, 3)
            answer = pipe.transformer(
                hidden_states=flux_packed(noisy),
                timestep=s.view(1),
                guidance=torch.tensor([guidance]),
                pooled_projections=first.pooler_output,
                encoder_hidden_states=t5_states(pipe.text_encoder_2, pipe.tokenizer_2, text),
                txt_ids=torch.zeros(CONTEXT, 3),
                img_ids=ids,
            ).sample
            error = (answer - flux_packed(target)).square().mean()
        else:
            second = clip_states(pipe.text_encoder_2, pipe.tokenizer_2, text)
            third = t5_states(pipe.text_encoder_3, pipe.tokenizer_3, text)
            clips = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            padded = nn.functional.pad(clips, (0, third.shape[-1] - clips.shape[-1]))
            answer = pipe.transformer(
                hidden_states=noisy,
                timestep=s.view(1) * 1000,
                encoder_hidden_states=torch.cat([padded, third], dim=1),
                pooled_projections=torch.cat([first.text_embeds, second.text_embeds], dim=-1),
            ).sample
            error = (answer - target).square().mean()
        errors.append(weigh(s) * error)
    return torch.stack(errors)


def uniform(each: EachItems) -> Tensor:
    return each(torch.rand)


@contextlib.contextmanager
def scheduled(pipe: Any, prediction_type: str) -> Iterator[None]:
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, prediction_type=prediction_type)
    yield
    pipe.scheduler = before


NOISE_CASES = {
    "SD1.5": ("sd15", "epsilon", None),
    "SD1.5, min-SNR": ("sd15", "epsilon", 5.0),
    "SD2, velocity": ("sd15", "v_prediction", None),
    "SDXL": ("sdxl", "epsilon", None),
    "SDXL, velocity, min-SNR": ("sdxl", "v_prediction", 0.5),
}
FLOW_CASES = {
    "SD3": ("sd3", {"weighting_scheme": "none"}, uniform, lambda s: 1.0),
    "SD3, logit-normal": (
        "sd3",
        {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.3},
        lambda each: torch.sigmoid(each(torch.normal, mean=0.5, std=0.3)),
        lambda s: 1.0,
    ),
    "SD3, sigma": ("sd3", {"weighting_scheme": "sigma_sqrt"}, uniform, lambda s: 1 / s**2),
    "Flux": ("flux", {"weighting_scheme": "none", "guidance_scale": 1.5}, uniform, lambda s: 1.0),
    "Flux, cosmap": (
        "flux",
        {"weighting_scheme": "cosmap", "guidance_scale": 1.5},
        uniform,
        lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2)),
    ),
}


def check_loss(family: Family, batch: DiffusionBatch, expected: Tensor) -> None:
    loss = DiffusionLoss(family, {}, Prompts(family, TEXTS, trained=False), prior_loss_weight=0.3, cached_latents=False)
    value = loss(batch)
    torch.testing.assert_close(value, expected[:2].mean() + 0.3 * expected[2:].mean(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(loss.errors(batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", NOISE_CASES)
@torch.no_grad()
def test_the_loss_of_noise_prediction(case: str, pipes: dict[str, Any]) -> None:
    name, kind, gamma = NOISE_CASES[case]
    pipe, batch = pipes[name], some_batch()
    with scheduled(pipe, kind):
        expected = expected_noise_prediction(pipe, batch, gamma)
        check_loss(family_of(pipe, snr_gamma=gamma), batch, expected)


@pytest.mark.parametrize("case", FLOW_CASES)
@torch.no_grad()
def test_the_loss_of_flow_matching(case: str, pipes: dict[str, Any]) -> None:
    name, objective, density, weigh = FLOW_CASES[case]
    pipe, batch = pipes[name], some_batch()
    expected = expected_flow_matching(pipe, batch, density, weigh, objective.get("guidance_scale", 0.0))
    check_loss(family_of(pipe, **objective), batch, expected)


def test_a_scheduler_of_another_kind_is_refused(pipes: dict[str, Any]) -> None:
    with scheduled(pipes["sd15"], "sample"), pytest.raises(ValueError, match="prediction_type is 'sample'"):
        family_of(pipes["sd15"])


# Cached prompts and latents


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_kept_encodings_are_each_prompts_own(name: str, pipes: dict[str, Any]) -> None:
    family = family_of(pipes[name])
    kept, anew = Prompts(family, TEXTS, trained=False, at_once=2), Prompts(family, TEXTS, trained=True)
    places = torch.tensor([2, 0, 1, 2])
    one, other = kept(places), anew(places)
    assert one.keys() == other.keys() and {len(tensor) for tensor in one.values()} == {4}
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one[key][0], one[key][1], atol=1e-3)


@torch.no_grad()
def test_kept_latents_are_their_items_own(pipes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    items = [
        Item(as_image(torch.rand(3, 20 + i, 24)), caption=i % 3, bucket=(16, 16) if i % 2 else (16, 32), prior=i > 2)
        for i in range(5)
    ]
    pixels = CaptionedPixels(items, center_crop=True)
    family = family_of(pipes["sd15"])
    kept = CachedLatents(pixels, family, seed=0)
    prompts = Prompts(family, TEXTS, trained=False)
    for indices in ([3, 1], [4, 0, 2]):
        values = []
        for data, cached in ((pixels, False), (kept, True)):
            loss = DiffusionLoss(family, {}, prompts, 1.0, cached)
            values.append(loss.errors(collate([data[index]._replace(seed=index) for index in indices])))
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


def test_an_image_is_turned_the_right_way_up(tmp_path: Path) -> None:
    from randlora_vision.training.dreambooth.batches import read_picture

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (4, 8)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*b\.png"):
        read_picture(tmp_path / "b.png")


# Sizes


def test_buckets() -> None:
    assert parse_buckets(None, 512, 8) == [(512, 512)]
    assert parse_buckets("16,32; 32,16", 512, 8) == [(16, 32), (32, 16)]
    auto = parse_buckets("auto", 512, 64)
    assert auto[0] == (512, 512) and (704, 384) in auto and (384, 704) in auto and len(auto) == len(set(auto))
    assert all(h % 64 == w % 64 == 0 and 0.8 < h * w / 512**2 < 1.25 for h, w in auto)
    for text, error in (("16", "height,width"), ("16,x", "height,width"), ("16,20", "multiples of 16"), ("", "height")):
        with pytest.raises(ValueError, match=error):
            parse_buckets(text, 512, 16)
    with pytest.raises(ValueError, match="--resolution 100.*multiples of 8"):
        parse_buckets(None, 100, 8)
    assert nearest_bucket((300, 620), auto) == min(auto, key=lambda b: abs(math.log(620 / 300 * b[0] / b[1])))
    assert nearest_bucket((100, 100), auto) == (512, 512)


def test_an_image_covers_its_bucket() -> None:
    gradient = Image.linear_gradient("L").resize((64, 32)).convert("RGB")  # dark above, bright below
    pixels, sizes = fit(gradient, (16, 16), center_crop=True)
    assert pixels.shape == (3, 16, 16) and sizes.tolist() == [32, 64, 0, 8, 16, 16]
    assert pixels[:, 0].max() < -0.9 and pixels[:, -1].min() > 0.9
    pixels, sizes = fit(gradient, (8, 32), center_crop=True)  # the center of 16 x 32
    assert sizes.tolist() == [32, 64, 4, 0, 8, 32] and -0.6 < pixels[:, 0].mean() < -0.3
    small, sizes = fit(gradient, (64, 64), center_crop=True)
    assert small.shape == (3, 64, 64) and sizes.tolist() == [32, 64, 0, 32, 64, 64]
    corners = {tuple(fit(gradient, (16, 16), center_crop=False)[1].tolist()[2:4]) for _ in range(200)}
    assert {left for _, left in corners} == set(range(17)) and {top for top, _ in corners} == {0}


def test_batches_stay_in_one_bucket_and_see_everything() -> None:
    buckets = [(16, 16)] * 5 + [(16, 32)] * 3 + [(16, 16)] * 2 + [(16, 32)] * 4
    prior = [False] * 8 + [True] * 6
    batches = list(BucketBatches(buckets, prior, batch_size=2, batches=400, seed=3))
    assert len(batches) == 400
    for batch in batches:
        assert len(batch) == 4 and len({buckets[index] for index in batch}) == 1
        assert [prior[index] for index in batch] == [False, False, True, True]
    counts = Counter(index for batch in batches for index in batch)
    assert all(95 <= counts[index] <= 105 for index in range(8))  # all equally often
    assert set(counts) == set(range(14))
    again = BucketBatches(buckets, prior, batch_size=2, batches=400, seed=3)
    assert list(again) == batches == list(again)
    assert list(BucketBatches(buckets, prior, 2, 400, seed=4)) != batches
    dealt = [
        list(BatchSamplerShard(BucketBatches(buckets, prior, 2, 400, 3), num_processes=2, process_index=index))
        for index in (0, 1)
    ]
    assert dealt == [batches[0::2], batches[1::2]]
    shorter = list(BucketBatches(buckets, prior, batch_size=2, batches=7, seed=3))
    assert shorter == batches[:7]  # a longer run starts like a shorter one
    alone = list(BucketBatches([(8, 8)], [False], batch_size=3, batches=2, seed=0))
    assert alone == [[0, 0, 0]] * 2


# Samples


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_samples_are_the_pipelines_own(name: str, pipes: dict[str, Any]) -> None:
    pipe = pipes[name]
    family = family_of(pipe)
    sampler = Sampler(
        family, (16, 32), at_once=3, autocast=lambda: torch.autocast("cpu", enabled=False), steps=2, guidance=4.0
    )
    gallery = Gallery(sampler, TEXTS[:2], each=2, seed=11, text_trained=False)
    rows = gallery.draw()
    assert [len(row) for row in rows] == [2, 2] and rows[0][0].shape == (3, 16, 32)
    length = {"max_sequence_length": CONTEXT} if name in ("sd3", "flux") else {}
    for text, row in zip(TEXTS, rows, strict=False):
        for number, picture in enumerate(row):
            generator = torch.Generator().manual_seed(11 + number)
            size = {"height": 16, "width": 32, "output_type": "pt"}
            expected = pipe(text, guidance_scale=4.0, generator=generator, **size, **TWO_STEPS, **length).images[0]
            torch.testing.assert_close(picture, expected, rtol=0, atol=2e-4)
    assert largest_difference(rows, gallery.draw()) == 0
    rows[1][0] = rows[1][0] + 0.25
    assert largest_difference(rows, gallery.draw()) == pytest.approx(0.25)
