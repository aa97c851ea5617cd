"""A frozen denoiser on disk: the numbers of the plain one, and no weights in memory between its layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import adapt, checkpoint_activations
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import DreamBoothAdapterOptions, DreamBoothOptions, PipelineOptions
from randlora_vision.training.dreambooth.samples import Gallery, Sampler
from tests.tiny_pipelines import CONTEXT, PIPELINES

PROMPT = "a photo of sks digit"


def weights(family: Family) -> list[Tensor]:
    return [p for name, p in family.denoiser.named_parameters() if "randlora" not in name]


@pytest.mark.parametrize(("name", "place"), [("sd3", "disk"), ("sd15", "cpu")])
def test_an_offloaded_base_trains_the_same_adapter(name: str, place: Any, tmp_path: Path) -> None:
    PIPELINES[name]().save_pretrained(tmp_path / "base")
    adapter = DreamBoothAdapterOptions(rank=4, alpha=80.0)

    def trained(place: Any) -> tuple[bytes, list[Tensor], Family]:
        options = resolve(DreamBoothOptions(adapter=adapter))
        family = load_family(
            str(tmp_path / "base"), ObjectiveOptions(), CONTEXT, text_first=place is not None, offload_to=place
        )
        gallery = Gallery(Sampler(family, (16, 16), 2, nullcontext, steps=2, guidance=3.0), [PROMPT], 1, 1, False)
        prompts = Prompts(family, [PROMPT], False)
        family.drop_text_encoders()
        family.load_denoiser()
        family.offload()
        pictures = [gallery.draw()[0][0]]
        adaptation = adapt(family, options)
        checkpoint_activations([family.denoiser])
        loss: Any = DiffusionLoss(family, {"denoiser": family.denoiser}, prompts, 1.0, cached_latents=False)
        loss = Accelerator(cpu=True).prepare(loss)
        optimizer = torch.optim.AdamW([parameter for _, parameter in adaptation.parameters()], lr=0.02)
        batch = DiffusionBatch(
            inputs=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
            captions=torch.zeros(2, dtype=torch.long),
            prior=torch.zeros(2, dtype=torch.bool),
            sizes=torch.tensor([[16, 16, 0, 0, 16, 16]] * 2),
            masks=torch.ones(2, 1, 1, 1),
            seeds=torch.arange(2),
            given=torch.zeros(2, 0),
        )
        family.denoiser.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        adaptation.save(tmp_path / "adapter.safetensors")
        with adaptation.with_saved(tmp_path / "adapter.safetensors"):
            pictures.append(gallery.draw()[0][0])
        return (tmp_path / "adapter.safetensors").read_bytes(), pictures, family

    content, pictures, _ = trained(None)
    found, same, family = trained(place)
    assert all(map(torch.equal, pictures, same)) and not torch.equal(*pictures)
    assert found == content
    assert weights(family) and all(parameter.is_meta for parameter in weights(family))
    fresh = load_family(str(tmp_path / "base"), ObjectiveOptions(), CONTEXT, offload_to=place)
    from randlora_vision.integrations.diffusers import load_adapter

    gallery = Gallery(Sampler(fresh, (16, 16), 2, nullcontext, steps=2, guidance=3.0), [PROMPT], 1, 1, False)
    load_adapter(fresh.pipe, tmp_path / "adapter.safetensors")
    fresh.offload()
    assert torch.equal(gallery.draw()[0][0], pictures[1])


def test_what_excludes_an_offloaded_base() -> None:
    for options in ({"quantize": "torchao-int8"}, {"torch_compile": True}, {"train_text_encoder": True}):
        with pytest.raises(ValueError, match="--offload-base excludes"):
            PipelineOptions(offload_base="disk", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--offload-base is for --method randlora"):
        DreamBoothOptions(pipeline=PipelineOptions(offload_base="cpu"), adapter=DreamBoothAdapterOptions(method="lora"))
