from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.training.clip.methods import clip_layers
from randlora_vision.training.harness.optim import layer_rates, timm_layers
from randlora_vision.training.methods.lora import inject_lora
from tests.training_helpers import tiny_clip

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "resnet18": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (2, 2, 2, 2)},
}


def timm_model(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=5, **SMALL[name])
    return model


@pytest.mark.parametrize("name", SMALL)
def test_rates_of_weights_are_timms(name: str) -> None:
    model = timm_model(name)
    rates = layer_rates(model, [timm_layers(model)], lr=0.3, decay=0.7)
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    expected = {id(p): 0.3 * group["lr_scale"] for group in groups for p in group["params"]}
    assert {id(p): rate for p, rate in rates.items()} == pytest.approx(expected)
    assert len(set(rates.values())) > 3


def test_adapters_learn_at_their_weights_rate() -> None:
    model = timm_model("vit_tiny_patch16_224")
    inject(model, RandLoRAConfig(rank=4, target_modules="all-linear", modules_to_save=["head"]))
    rates = layer_rates(model, [timm_layers(model)], lr=1.0, decay=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(rates) == set(trained.values())
    for name, parameter in trained.items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        assert rates[parameter] == (1.0 if name.startswith("head") else 0.5 ** (3 - int(block or -1))), name
    assert any(name.startswith("blocks.2.") for name in trained)


@pytest.mark.parametrize("method", ["full", "randlora", "lora"])
def test_the_towers_of_a_clip_are_counted_each_by_itself(tmp_path: Path, method: str) -> None:
    model = tiny_clip(tmp_path / "tiny").model
    if method == "randlora":
        inject(model, RandLoRAConfig(rank=4, target_modules="open_clip:both", modules_to_save=("logit_scale",)))
    elif method == "lora":
        towers = ("visual.transformer", "transformer")
        inject_lora(model, [f"{t}.resblocks.{n}.attn.in_proj_weight" for t in towers for n in (0, 1)], 2, 2.0)
    else:
        model.requires_grad_(True)
    rates = layer_rates(model, clip_layers(model), lr=1.0, decay=0.5)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: rate for p, rate in rates.items()}
    assert "logit_scale" not in found  # at the common rate
    for name, rate in found.items():
        blocks = name.split("resblocks.")
        if len(blocks) == 2:
            assert rate == {"0": 0.25, "1": 0.5}[blocks[1][0]], name
    assert {name.startswith("visual.") for name in found} == {True, False}
    if method == "full":
        ends = ("visual.proj", "text_projection")
        stems = ("visual.conv1.weight", "visual.ln_pre.bias", "token_embedding.weight", "positional_embedding")
        assert [found[name] for name in ends] == [1.0, 1.0]
        assert [found[name] for name in stems] == [0.125] * 4
        assert [found[name] for name in ("visual.ln_post.weight", "ln_final.bias")] == [0.5, 0.5]  # with the last block
        assert set(found) == set(names.values()) - {"logit_scale"}


CUSTOM: dict[str, dict[str, Any]] = {
    "timm tower": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}


@pytest.mark.parametrize("kind", CUSTOM)
def test_other_vision_towers(kind: str) -> None:
    vision = {"image_size": 224 if kind == "timm tower" else 32, **CUSTOM[kind]}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    with torch.device("meta"):
        model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    layers, _ = clip_layers(model)
    assert set(layers) == {name for name, _ in model.named_parameters() if name.startswith("visual.")}
    if kind == "ResNet":
        stages = [layers[f"visual.layer{n}.0.conv1.weight"] for n in (1, 2, 3, 4)]
        assert stages == [1, 2, 3, 4]
        assert layers["visual.conv1.weight"] == 0 and layers["visual.attnpool.c_proj.weight"] == 5
    else:
        assert layers["visual.trunk.patch_embed.proj.weight"] == 0
        assert layers["visual.trunk.blocks.11.attn.qkv.weight"] == layers["visual.trunk.norm.weight"] == 12
        assert layers["visual.head.proj.weight"] == 13


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="--layer-decay: Linear does not define its layers, leave it out"):
        timm_layers(nn.Linear(2, 2))
