"""Adapter files and pipelines that are not quite those of the training: parts are missing, or layers were added."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter
from randlora_vision.injection.selection import preset_names
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize, snapshot
from tests.pipeline_helpers import adapt, deltas, denoiser, difference, plain
from tests.tiny_pipelines import PIPELINES, sample


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Any, Any, Path]:
    """A pipeline with adapters in its denoiser and text encoder, their updates, and the file."""
    pipe = PIPELINES["sd15"]()
    reports = adapt(pipe)
    return pipe, deltas(pipe, reports), integration.save_adapter(pipe, tmp_path / "adapter.safetensors")


def without(pipe: Any, *parts: str) -> Any:
    """The pipeline as `from_pretrained(..., text_encoder=None)` makes it."""
    return type(pipe)(**{**pipe.components, **dict.fromkeys(parts)}, requires_safety_checker=False)


def test_one_part_of_a_bundle(bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, updates, path = bundle
    for part in ("unet", "text_encoder"):
        pipe = PIPELINES["sd15"]()
        caplog.clear()
        reports = integration.load_adapter(pipe, path, component=part)
        assert list(reports) == [part] and list(integration.list_adapters(pipe)) == [part]
        other = ({"unet", "text_encoder"} - {part}).pop()
        note = f"{path}: component={part!r} leaves out {other}"
        assert reports[part].warnings[-1] == note and note in caplog.text
        only = plain("sd15", {name: delta for name, delta in updates.items() if name.startswith(f"{part}.")})
        assert difference(sample(pipe), sample(only)) < 1e-4 < difference(sample(pipe), sample(PIPELINES["sd15"]()))


def test_a_pipeline_without_its_text_encoder(bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole, _, path = bundle
    encoding = PIPELINES["sd15"]()
    integration.load_adapter(encoding, path)
    assert not caplog.records
    with torch.no_grad():
        prompts = encoding.encode_prompt("a photo of sks dog", "cpu", 1, True)
    small = without(PIPELINES["sd15"](), "text_encoder", "tokenizer")
    reports = integration.load_adapter(small, path)
    assert list(reports) == ["unet"]
    assert reports["unet"].warnings[-1] == f"{path}: this StableDiffusionPipeline was loaded without text_encoder"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    inputs = dict(zip(("prompt_embeds", "negative_prompt_embeds"), prompts, strict=True))
    options = dict(num_inference_steps=2, height=16, width=16, output_type="pt")
    images = [pipe(**inputs, generator=torch.Generator().manual_seed(0), **options).images for pipe in (small, whole)]
    assert torch.equal(*images)


def test_what_cannot_be_loaded_in_part(bundle: Any, tmp_path: Path) -> None:
    pipe, _, path = bundle
    fresh = PIPELINES["sd15"]()
    before = snapshot(fresh.unet)
    with pytest.raises(ValueError, match=r"holds adapters for text_encoder, unet, but none for component='vae'"):
        integration.load_adapter(fresh, path, component="vae")
    with pytest.raises(ValueError, match="is for 'text_encoder', but this pipeline has: unet"):
        integration.load_adapter(without(fresh, "text_encoder"), path, component="text_encoder")
    inject(pipe.text_encoder, RandLoRAConfig(rank=2, target_modules="diffusers:text"), "text")
    alone = integration.save_adapter(pipe, tmp_path / "text.safetensors", "text")
    with pytest.raises(ValueError, match="is for text_encoder, which this StableDiffusionPipeline was loaded without"):
        integration.load_adapter(without(fresh, "text_encoder"), alone)
    with pytest.raises(ValueError, match="is for 'unet', but this pipeline has: transformer"):
        integration.load_adapter(PIPELINES["flux"](), path, component="unet")
    assert snapshot(fresh.unet) == before


def add_ip_adapter(model: nn.Module) -> None:
    """The layers that diffusers' `load_ip_adapter` adds to a denoiser, by its own classes."""
    from diffusers.models import attention_processor as processors
    from diffusers.models import embeddings
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(0)
    added = {}
    for name, old in model.attn_processors.items():
        attention = model.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            sizes = (attention.to_k.out_features, attention.to_k.in_features)
            added[name] = processors.IPAdapterAttnProcessor2_0(*sizes, num_tokens=(4,))
        elif name.startswith("transformer_blocks.") and "Flux" in type(model).__name__:
            added[name] = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(4,))
        else:
            added[name] = old
    model.set_attn_processor(added)
    project = embeddings.IPAdapterPlusImageProjection(
        embed_dims=32, output_dims=32, hidden_dims=32, depth=1, dim_head=16, heads=2, num_queries=4
    )
    model.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection([project])


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_presets_leave_an_ip_adapter_alone(family: str) -> None:
    model = denoiser(PIPELINES[family]())
    before = {preset: preset_names(model, f"diffusers:{preset}") for preset in ("attention", "backbone", "conv")}
    add_ip_adapter(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert any("_ip." in name for name in linears) and any("encoder_hid_proj" in name for name in linears)
    assert before == {preset: preset_names(model, f"diffusers:{preset}") for preset in before}


@pytest.mark.parametrize("targets", ["all-linear", "diffusers:conv", "[^.]+.*to_[kv]"])
def test_a_file_of_a_plain_unet_loads_into_one_with_an_ip_adapter(tmp_path: Path, targets: str) -> None:
    trained, other = PIPELINES["sd15"]().unet, PIPELINES["sd15"]().unet
    inject(trained, RandLoRAConfig(rank=4, target_modules=targets))
    randomize(trained)
    path = save_adapter(trained, tmp_path / "adapter.safetensors")
    add_ip_adapter(other)
    own = trained.state_dict().keys()
    added = {name: value.clone() for name, value in other.state_dict().items() if name not in own}
    report = load_adapter(other, path)
    for target in report.targets:
        assert torch.equal(other.get_submodule(target.name).weight, trained.get_submodule(target.name).weight)
    assert any("_ip." in name for name in added)
    after = other.state_dict()
    assert all(torch.equal(after[name], value) for name, value in added.items())
    assert save_adapter(other, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
