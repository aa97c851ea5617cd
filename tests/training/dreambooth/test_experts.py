"""A pipeline of two denoisers: which one learns what, in one file, and how the file comes back."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_vision.integrations import diffusers as pipelines
from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.dry_run import measure
from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import adapt, trained_components
from randlora_vision.training.dreambooth.noise import Noise
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import DreamBoothAdapterOptions, DreamBoothOptions, PipelineOptions
from randlora_vision.training.dreambooth.samples import Gallery, Sampler, largest_difference
from tests.tiny_families import TINY
from tests.training.dreambooth.test_quantization import is_quantised

PROMPT = "a photo of sks digit"
BOTH = ["transformer", "transformer_2"]
BOUNDARY = 875
LATENTS = (4, 1, 8, 16)


def family_of(name: str = "wan_experts", **options: Any) -> Family:
    pipe = TINY[name]()
    return FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(**options), 64)


def settings(method: Any = "randlora", **options: Any) -> Any:
    adapter = DreamBoothAdapterOptions(method=method, rank=4)
    return resolve(DreamBoothOptions(adapter=adapter, objective=ObjectiveOptions(**options)))


@pytest.mark.parametrize("shift", [None, "12", "0.2"])
@pytest.mark.parametrize("expert", [None, "high-noise", "low-noise"])
def test_half_of_the_samples_are_at_the_levels_of_each_expert(shift: str | None, expert: Any) -> None:
    objective = family_of(expert=expert, discrete_flow_shift=shift).objective
    seeds = range(400)
    noised = objective(torch.zeros(len(seeds), *LATENTS), Noise(len(seeds), seeds))
    high = noised.timesteps >= BOUNDARY
    assert int(high.sum()) in {None: range(160, 240), "high-noise": (400,), "low-noise": (0,)}[expert]
    for levels, first, last in ((noised.timesteps[high], BOUNDARY, 1000), (noised.timesteps[~high], 0, BOUNDARY)):
        if len(levels):  # all over the range, as a normal distribution of logits is
            assert first <= levels.min() < first + (last - first) / 3 and last - (last - first) / 3 < levels.max()
    few = objective(torch.zeros(2, *LATENTS), Noise(2, [7, 5]))
    assert torch.equal(few.timesteps, noised.timesteps[[7, 5]])  # of a sample, whatever is beside it


@torch.no_grad()
def test_every_item_of_a_batch_goes_to_the_expert_of_its_level() -> None:
    family = family_of()
    torch.manual_seed(0)
    latents, timesteps = torch.randn(4, *LATENTS), torch.tensor([500.0, 900.0, BOUNDARY, 874.0])
    encoded = family.encode([PROMPT, "a dog", "a photo", PROMPT])
    together = family.predict(latents, timesteps, encoded, torch.zeros(4, 6))
    for row, expert in enumerate(("transformer_2", "transformer", "transformer", "transformer_2")):
        own = slice(row, row + 1)
        alone = getattr(family.pipe, expert)(latents[own], timesteps[own], encoded["prompt_embeds"][own]).sample
        torch.testing.assert_close(together[own], alone, rtol=1e-4, atol=1e-5)


@cache
def inputs() -> Tensor:
    return torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def step(family: Family, adaptation: Any, seed: int) -> list[str]:
    """One step on one image, whose level depends on the seed; return the components with gradients."""
    loss = DiffusionLoss(family, {}, Prompts(family, [PROMPT], False), 1.0, cached_latents=False)
    zeros = torch.zeros(1, dtype=torch.long)
    batch = DiffusionBatch(inputs=inputs(), captions=zeros, prior=zeros.bool(), sizes=torch.zeros(1, 6), given=zeros,
                           masks=torch.ones(1, 1, 1, 1), seeds=torch.tensor([seed]))  # fmt: skip
    parameters = dict(adaptation.parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
    loss(batch).backward()
    assert not [note for note in adaptation.check_gradients() if "zero" not in note]
    optimizer.step()
    found = [name.partition(".")[0] for name, parameter in parameters.items() if parameter.grad is not None]
    optimizer.zero_grad()
    return sorted(set(found))


@pytest.mark.parametrize("method", ["randlora", "lora", "full"])
def test_an_expert_without_items_in_a_step_is_no_error(method: Any) -> None:
    family = family_of()
    adaptation = adapt(family, settings(method))
    assert {name.partition(".")[0] for name, _ in adaptation.parameters()} == set(BOTH)
    steps = [step(family, adaptation, seed) for seed in range(4)]
    assert sorted(map(tuple, {tuple(names) for names in steps})) == [("transformer",), ("transformer_2",)]


def gallery_of(family: Family) -> Gallery:
    sampler = Sampler(family, (16, 32), 2, nullcontext, steps=2, guidance=3.0)
    return Gallery(sampler, [PROMPT], each=1, seed=1, text_trained=False)


@pytest.mark.parametrize(("method", "expert"), [("randlora", None), ("randlora", "low-noise"), ("lora", None)])
def test_the_file_of_the_experts_makes_another_pipeline_the_trained_one(
    method: Any, expert: Any, tmp_path: Path
) -> None:
    family, chosen = family_of(expert=expert), settings(method, expert=expert)
    names = BOTH if expert is None else BOTH[1:]
    assert trained_components(family, chosen) == names
    before = gallery_of(family).draw()
    adaptation = adapt(family, chosen)
    for seed in range(4):
        step(family, adaptation, seed)
    path = tmp_path / "adapter.safetensors"
    adaptation.save(path)
    trained = gallery_of(family).draw()
    assert largest_difference(before, trained) > 1e-3
    fresh = family_of()
    gallery, scope = gallery_of(fresh), {"pipe": fresh.pipe}
    exec("\n".join(adaptation.loading_code(path)), scope)  # as the script prints it
    assert largest_difference(gallery.draw(), trained) < 1e-5
    if method == "randlora":
        assert list(pipelines.list_adapters(fresh.pipe)) == names
        pipelines.fuse(fresh.pipe)
        assert largest_difference(gallery.draw(), trained) < 1e-4
        pipelines.delete_adapter(unfused(fresh.pipe), "default")
        assert largest_difference(gallery.draw(), before) == 0
        again = adapt(family_of(expert=expert), chosen)
        again.start_from(path)
        assert all(torch.equal(*pair) for pair in zip(values(again), values(adaptation), strict=True))


def unfused(pipe: Any) -> Any:
    pipelines.unfuse(pipe)
    return pipe


def values(adaptation: Any) -> list[Tensor]:
    return [parameter.detach() for _, parameter in adaptation.parameters()]


def test_both_experts_are_loaded_late_quantised_and_counted(tmp_path: Path) -> None:
    TINY["wan_experts"]().save_pretrained(tmp_path)
    family = load_family(str(tmp_path), ObjectiveOptions(), 64, quantize="torchao-int8", text_first=True)
    assert all(p.is_meta for part in family.denoisers.values() for p in part.parameters())
    family.move(torch.device("cpu"))
    family.drop_text_encoders()
    family.load_denoiser()
    assert list(family.denoisers) == BOTH
    for part in family.denoisers.values():
        assert is_quantised(part.blocks[0].attn1.to_q.weight)
    one, two = (measure(str(tmp_path), settings(expert=expert), torch.float32) for expert in ("high-noise", None))
    sizes = {part.name: part.bytes for part in two.parts}
    assert two.trained_numbers == 2 * one.trained_numbers and two.text_bytes == sizes["text_encoder"] + sizes["vae"]
    assert two.training_bytes > sizes["transformer"] + sizes["transformer_2"] + sizes["vae"]
    with pytest.raises(ValueError, match="--gguf-file holds one denoiser, but this WanPipeline has two"):
        load_family(str(tmp_path), ObjectiveOptions(), quantize="gguf", gguf_file="x.gguf")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--expert is for a pipeline with two denoisers, but this WanPipeline has one"):
        family_of("wan", expert="low-noise")
    pipe = TINY["wan_experts"]()
    pipe.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    without = '"transformer_2": [\n    null,\n    null\n  ]'
    (tmp_path / "model_index.json").write_text(
        index.replace('"transformer_2": [\n    "diffusers",\n    "WanTransformer3DModel"\n  ]', without)
    )
    with pytest.raises(ValueError, match="is a WanPipeline without its transformer_2"):
        load_family(str(tmp_path), ObjectiveOptions())
    with pytest.raises(ValueError, match="this WanPipeline has no transformer_2"):
        measure(str(tmp_path), resolve(DreamBoothOptions(pipeline=PipelineOptions())), torch.float32)
    with pytest.raises(ValueError, match="diffusers loads no LoRA into a PixArtSigmaPipeline: give --method randlora"):
        trained_components(family_of("pixart_sigma"), settings("lora"))


@pytest.mark.parametrize("name", ["wan_experts", "wan_5b", "flux2_klein"])
def test_pictures_are_made_with_the_settings_of_the_pipeline(name: str) -> None:
    family = family_of(name)
    if name == "flux2_klein":
        family.pipe.register_to_config(is_distilled=True)
    view = family.like(text_encoder=None)
    for setting in ("boundary_ratio", "expand_timesteps", "is_distilled"):
        assert view.config.get(setting) == family.pipe.config.get(setting)
    assert view.text_encoder is None
