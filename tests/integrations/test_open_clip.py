"""The presets of every family of open_clip towers, at small sizes of the same classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, check_gradients, inject
from randlora_vision.integrations.open_clip import PRESETS
from tests.zoo.from_open_clip import (
    CUSTOM,
    QUERIES,
    SIGLIP_TEXT,
    SIZE,
    TEXT,
    TIMM_VIT,
    VISION,
    clip,
    clip_with_hf,
    coca,
    run,
)
from tests.zoo.from_open_clip import clip_with_timm as timm_clip

BLOCK = ["attn.in_proj_weight", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]


def blocks(path: str, parts: list[str], count: int = 2) -> list[str]:
    return [f"{path}.{number}.{part}" for number in range(count) for part in parts]


CLASSIC_TEXT = blocks("transformer.resblocks", BLOCK)
CUSTOM_TEXT = blocks("text.transformer.resblocks", BLOCK)
VIT = blocks("visual.transformer.resblocks", BLOCK)
QKV = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
EVA = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]
POOL = [f"visual.trunk.attn_pool.{part}" for part in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")]
SEPARATE = [f"visual.attn_pool.attn.{part}_proj_weight" for part in "qkv"] + ["visual.attn_pool.attn.out_proj"]
PACKED = ["visual.attn_pool.attn.in_proj_weight", "visual.attn_pool.attn.out_proj"]
ROBERTA = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
T5 = [f"0.SelfAttention.{part}" for part in "qkvo"] + [f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")]
RESNET = dict(layers=[1] * 4, width=16, head_width=64, image_size=64)
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))
BOTTLENECK = ["conv1", "conv2", "conv3", "downsample.0"]

FAMILIES: dict[str, tuple[Any, list[str], list[str]]] = {
    "CLIP": (clip, VIT, CLASSIC_TEXT),
    "CustomTextCLIP": (partial(clip, "CustomTextCLIP"), VIT, CUSTOM_TEXT),
    "own attention": (
        partial(clip, "CustomTextCLIP", vision=VISION | CUSTOM, text=TEXT | CUSTOM),
        VIT,
        CUSTOM_TEXT,
    ),
    "text projection as a layer": (partial(clip, text=SIGLIP_TEXT), VIT, CLASSIC_TEXT),
    "CoCa": (coca, [*VIT, *PACKED], CUSTOM_TEXT),
    "CoCa, pool of another width": (
        partial(clip, vision=VISION | QUERIES | {"attentional_pool": True}),
        [*VIT, *SEPARATE],
        CLASSIC_TEXT,
    ),
    "SigLIP": (
        partial(
            timm_clip,
            "vit_base_patch16_siglip_224",
            TIMM_VIT,
            SIGLIP_TEXT,
            timm_pool="map",
            timm_proj="none",
        ),
        [*blocks("visual.trunk.blocks", QKV), *POOL],
        CUSTOM_TEXT,
    ),
    "timm ViT, head as projection": (
        partial(timm_clip, "vit_tiny_patch16_224", TIMM_VIT, timm_pool="token", timm_proj=""),
        blocks("visual.trunk.blocks", QKV),
        CUSTOM_TEXT,
    ),
    "EVA02": (
        partial(timm_clip, "eva02_base_patch16_clip_224", TIMM_VIT, timm_pool="token", timm_proj=""),
        blocks("visual.trunk.blocks", EVA),
        CUSTOM_TEXT,
    ),
    "ConvNeXt": (
        partial(timm_clip, "convnext_tiny", CONVNEXT, timm_pool="", timm_proj="linear"),
        [f"visual.trunk.stages.{stage}.blocks.0.mlp.{part}" for stage in range(4) for part in ("fc1", "fc2")],
        CUSTOM_TEXT,
    ),
    "ResNet": (
        partial(clip, vision=RESNET),
        [
            *(f"visual.layer{number}.0.{part}" for number in range(1, 5) for part in BOTTLENECK),
            *(f"visual.attnpool.{part}_proj" for part in "kqvc"),
        ],
        CLASSIC_TEXT,
    ),
    "HF RoBERTa": (
        partial(clip_with_hf, "roberta"),
        VIT,
        blocks("text.transformer.encoder.layer", [*ROBERTA, "intermediate.dense", "output.dense"]),
    ),
    "HF mT5": (partial(clip_with_hf, "mt5"), VIT, blocks("text.transformer.block", [f"layer.{x}" for x in T5])),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str], list[str]]:
    make, vision, text = FAMILIES[request.param]
    torch.manual_seed(0)
    return make(), vision, text


def test_presets_name_the_weights_of_the_towers(family: tuple[nn.Module, list[str], list[str]]) -> None:
    model, vision, text = family
    assert PRESETS["vision"](model) == vision
    assert PRESETS["text"](model) == text
    assert PRESETS["both"](model) == vision + text


def test_every_adapter_of_a_preset_learns(family: tuple[nn.Module, list[str], list[str]]) -> None:
    model, vision, text = family
    report = inject(model, RandLoRAConfig(rank=8, target_modules="open_clip:both"))
    assert {target.name for target in report.targets} == {*vision, *text}
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):  # zero in an untrained ResNet, which cuts its blocks off
            nn.init.ones_(parameter)
    run(model.train()).square().sum().backward()
    assert check_gradients(model) == []


def test_a_second_adapter_finds_the_same_weights(family: tuple[nn.Module, list[str], list[str]]) -> None:
    model, vision, text = family
    inject(model, RandLoRAConfig(rank=8, target_modules="open_clip:vision"), "first")
    assert PRESETS["both"](model) == vision + text
    report = inject(model, RandLoRAConfig(rank=8, target_modules="open_clip:both"), "second")
    assert len(report.targets) == len(vision + text)


def test_grouped_convolutions_and_narrow_layers_are_left_out() -> None:
    """MobileCLIP: convolutions hold most of the weights, but not the depthwise ones."""
    model = timm_clip(
        "fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}, timm_pool="avg", timm_proj=""
    )
    names = PRESETS["vision"](model)
    assert any(name.endswith("mlp.fc1") for name in names)
    for name in names:
        module = model.get_submodule(name)
        assert getattr(module, "groups", 1) == 1
        assert min(module.weight.shape[0], module.weight[0].numel()) >= 16
    assert not any(part in name for name in names for part in ("stem", "head"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", [nn.Linear(SIZE, SIZE), nn.TransformerEncoderLayer(16, 2)])
def test_other_models_are_refused(preset: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match="need a model of open_clip .* got "):
        PRESETS[preset](model)
    with pytest.raises(ValueError, match="need a model of open_clip"):
        inject(model, RandLoRAConfig(rank=4, target_modules=f"open_clip:{preset}"))
