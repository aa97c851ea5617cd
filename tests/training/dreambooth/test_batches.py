"""Training samples that do not depend on how they are dealt to processes, and the masks of their losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.batches import (
    CachedLatents,
    CaptionedPixels,
    DiffusionBatch,
    Prompts,
    diffusion_batches,
)
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.objectives import Noised, NoisePrediction, ObjectiveOptions
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.subject import Subject, make_items, read_subject
from randlora_vision.training.harness.seeding import seed_everything, seeded_items

STEPS, GLOBAL_BATCH = 6, 4


def pictures(count: int, size: tuple[int, int] = (24, 20)) -> list[Image.Image]:
    torch.manual_seed(1)
    return [Image.fromarray((torch.rand(size[1], size[0], 3) * 255).byte().numpy()) for _ in range(count)]


class Plain:
    """A pipeline whose latents are the pixels at half the size, and whose prediction is zero."""

    device = torch.device("cpu")
    dtype = torch.float32
    takes = None
    options = ObjectiveOptions()
    denoiser = nn.Linear(1, 1)

    def moments(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 2)

    def latents(self, moments: Tensor, noise: Any) -> Tensor:
        return moments

    def objective(self, latents: Tensor, noise: Any) -> Any:
        one = torch.ones(len(latents))
        return Noised(latents, one, latents, one, one)

    def predict(self, latents: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(latents)

    def encode(self, texts: Any) -> Any:
        return {"prompt_embeds": torch.zeros(len(texts), 1, 1)}


class Noisy(Plain):
    """The same with latents and noise levels that are drawn."""

    def latents(self, moments: Tensor, noise: Any) -> Tensor:
        return moments + noise.normal(moments.shape[1:], moments.device)

    def objective(self, latents: Tensor, noise: Any) -> Any:
        scheduler = DDPMScheduler(beta_schedule="scaled_linear")
        return NoisePrediction(scheduler, ObjectiveOptions(snr_gamma=5.0, noise_offset=0.1))(latents, noise)


def step_values(loss: DiffusionLoss, data: Any, processes: int, accumulation: int) -> Iterator[tuple[Any, float]]:
    """Yield what each optimiser step trains on, and its loss, as computed by processes with numbers of their own."""
    size = GLOBAL_BATCH // processes // accumulation
    batches = STEPS * processes * accumulation
    loader = seeded_items(diffusion_batches(data, size, batches, seed=3, workers=0), 3)
    shards = [iter(prepare_data_loader(loader, num_processes=processes, process_index=i)) for i in range(processes)]
    for step in range(STEPS):
        parts: list[DiffusionBatch] = []
        values = []
        for process, shard in enumerate(shards):
            for part in range(accumulation):
                parts.append(next(shard))
                seed_everything("step", 3, process, step, part)  # as the training loop does
                values.append(loss(parts[-1]).item())
        samples = zip(*(torch.cat([part[name] for part in parts]).tolist() for name in NAMES), strict=True)
        yield sorted(samples), sum(values) / len(values)


NAMES = ("prior", "seeds", "captions", "sizes")


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_processes_and_accumulation_train_on_the_samples_of_one_batch(cached: bool) -> None:
    family: Any = Noisy()
    options = SubjectOptions(caption_dropout_rate=0.3, shuffle_caption=True)
    subject = Subject("x", pictures(3), ["sks, a, b", "c, d", "e"])
    items, prompts = make_items(subject, [(image, "class") for image in pictures(5)], [(16, 16)], options, 0)
    pixels = CaptionedPixels(items, center_crop=False)
    data = CachedLatents(pixels, family, seed=3) if cached else pixels
    loss = DiffusionLoss(family, {}, Prompts(family, prompts, trained=False), 0.5, cached)
    whole = list(step_values(loss, data, 1, 1))
    seeds = [sample[1] for samples, _ in whole for sample in samples]
    assert len(set(seeds)) == len(seeds) == STEPS * GLOBAL_BATCH * 2
    if not cached:
        assert len({tuple(sample[3]) for samples, _ in whole for sample in samples}) > 2  # random crops
    for processes, accumulation in ((2, 1), (4, 1), (1, 4), (2, 2)):
        parts = list(step_values(loss, data, processes, accumulation))
        for (expected, value), (actual, mean) in zip(whole, parts, strict=True):
            assert actual == expected
            assert mean == pytest.approx(value, rel=1e-5)


# Masks


def masked_images(root: Path) -> Path:
    """Images of noise, transparent in their left half but for one, with their alpha as masks of half the size."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number, picture in enumerate(pictures(3, (24, 16))):
        alpha = Image.new("L", picture.size, 255)
        if number:
            ImageDraw.Draw(alpha).rectangle((0, 0, 11, 15), fill=0)
        picture.putalpha(alpha)
        picture.save(root / "images" / f"{number}.png")
        alpha.resize((12, 8)).save(root / "masks" / f"{number}.png")
    return root


@pytest.mark.parametrize("way", ["alpha", "files"])
@pytest.mark.parametrize("cached", [True, False])
def test_masked_pixels_have_no_loss(way: str, cached: bool, tmp_path: Path) -> None:
    folder = masked_images(tmp_path)
    masks = {"alpha_mask": True} if way == "alpha" else {"mask_data_dir": str(folder / "masks")}
    options = SubjectOptions(instance_data_dir=str(folder / "images"), instance_prompt="x", **masks)  # type: ignore[arg-type]
    subject = read_subject(options, SkipList())
    family: Any = Plain()
    items, prompts = make_items(subject, [(pictures(1)[0], "class")], [(8, 8)], options, 0)
    pixels = CaptionedPixels(items, center_crop=False)
    data = CachedLatents(pixels, family, seed=0) if cached else pixels
    loss = DiffusionLoss(family, {}, Prompts(family, prompts, trained=False), 1.0, cached)
    seen = set()
    for batch in diffusion_batches(data, 3, 8, seed=0, workers=0):
        inputs = batch["inputs"] if cached else family.moments(batch["inputs"])
        for values, sizes, masked, error in zip(
            inputs, batch["sizes"], batch["masks"], loss.errors(batch).tolist(), strict=True
        ):
            left = sizes[3].item()  # of the crop of 8 pixels in a width of 12, whose first 6 are transparent
            opaque = round(masked.mean().item() * 8) if masked.min() < 0.5 else 8
            seen.add(opaque)
            if opaque < 8:
                assert opaque == pytest.approx(left + 2, abs=1)
            weight = nn.functional.avg_pool2d(masked, 2)
            assert error == pytest.approx((values.square() * weight).mean().item(), rel=1e-5)
        assert torch.equal(batch["masks"][batch["prior"]], torch.ones(3, 1, 8, 8))
    assert 8 in seen and len(seen) > 1


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = masked_images(tmp_path)

    def message(**options: Any) -> str:
        with pytest.raises(ValueError) as error:
            read_subject(
                SubjectOptions(instance_data_dir=str(folder / "images"), instance_prompt="x", **options), SkipList()
            )
        return str(error.value)

    (folder / "masks" / "1.png").rename(folder / "masks" / "one.png")
    assert "has no mask for 1.png: expected 1.png" in message(mask_data_dir=str(folder / "masks"))
    Image.new("L", (8, 8)).save(folder / "masks" / "1.png")
    assert "has 8 x 8 pixels, but" in message(mask_data_dir=str(folder / "masks"))
    assert "--mask-data-dir nowhere does not exist" in message(mask_data_dir="nowhere")
    for path in (folder / "images").iterdir():
        Image.new("RGB", (8, 8)).save(path)
    assert "no image has a transparent pixel" in message(alpha_mask=True)
    with pytest.raises(ValueError, match="--mask-data-dir and --alpha-mask"):
        SubjectOptions(instance_data_dir="x", alpha_mask=True, mask_data_dir="y")
