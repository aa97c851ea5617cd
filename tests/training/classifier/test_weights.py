"""Files of weights of other image sizes, of other numbers of channels, and with the names of the original authors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora_vision.training.classifier.models import load_classifier
from randlora_vision.training.classifier.options import ModelOptions
from tests.training_helpers import write_tiny_vit

State = dict[str, Tensor]
VIT = ("patch_size=8", "embed_dim=32", "depth=1", "num_heads=2")
SWIN = ("embed_dim=8", "depths=(1,2)", "num_heads=(1,2)")
CONVNEXT = ("depths=(1,1,1,1)", "dims=(8,8,8,8)")
REGISTERS = (*VIT, "reg_tokens=2", "no_embed_class=True")


def mae(state: State) -> dict[str, State]:
    """The names of a masked autoencoder, with part of its decoder."""
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    return {"model": {**encoder, "decoder_embed.bias": torch.ones(2)}}


def dinov2(state: State) -> State:
    """The names of facebook's DINOv2 with registers, whose position grid has one for the class token."""
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    first = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - first
    state["register_tokens"] = state.pop("reg_token")
    return {**state, "mask_token": torch.zeros(1, 32)}


def convnext(state: State) -> State:
    """The names of facebook's ConvNeXt."""
    changes = {
        r"^stem\.": "downsample_layers.0.",
        r"^stages\.(\d)\.downsample": r"downsample_layers.\1",
        r"\.blocks\.": ".",
        "conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"^head\.norm": "norm",
        r"^head\.fc": "head",
    }
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in changes.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def swin(state: State) -> State:
    """The names of Microsoft's Swin, with its buffers."""
    state = {name.replace("head.fc", "head"): value for name, value in state.items()}
    for name in [name for name in state if "layers.1.downsample" in name]:
        state[name.replace("layers.1", "layers.0")] = state.pop(name)
    return {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)}


FILES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable[[State], Any]]] = {
    "other size": ("vit_tiny_patch16_224", (*VIT, "img_size=32"), (*VIT, "img_size=16"), dict),
    "relative positions": ("swin_tiny_patch4_window7_224", (*SWIN, "img_size=32", "window_size=4"),
                           (*SWIN, "img_size=32", "window_size=2"), dict),
    "MAE": ("vit_tiny_patch16_224", (*VIT, "img_size=16"), (*VIT, "img_size=24"), mae),
    "DeiT": ("deit_tiny_patch16_224", (*VIT, "img_size=16"), (*VIT, "img_size=24"), lambda state: {"model": state}),
    "DINOv2": ("vit_tiny_patch16_224", (*REGISTERS, "img_size=24"), (*REGISTERS, "img_size=16"), dinov2),
    "ConvNeXt": ("test_convnext", CONVNEXT, CONVNEXT, convnext),
    "Swin": ("swin_tiny_patch4_window7_224", (*SWIN, "img_size=32", "window_size=4"),
             (*SWIN, "img_size=32", "window_size=2"), swin),
    "Swin of timm 0.6": ("swin_tiny_patch4_window7_224", (*SWIN, "img_size=16"), (*SWIN, "img_size=16"),
                         lambda state: {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)}),
}  # fmt: skip


def create(name: str, words: tuple[str, ...], **more: Any) -> Any:
    return timm.create_model(name, **ModelOptions(model=name, model_kwargs=words).arguments, **more).eval()


@pytest.mark.filterwarnings("ignore:.*(searchsorted|non-tuple sequence)")  # timm's resizing of relative positions
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_adapted_as_timm_adapts_pretrained_weights(kind: str, tmp_path: Path) -> None:
    name, saved, words, rename = FILES[kind]
    torch.manual_seed(1)
    path = str(tmp_path / "x.pth")
    torch.save(rename(create(name, saved, num_classes=5).state_dict()), path)
    overlay = {"file": path, "custom_load": False, "num_classes": 5 if kind not in ("MAE", "DINOv2") else -1}
    expected = create(name, words, num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    given = ModelOptions(model=name, model_kwargs=words, initial_checkpoint=path)
    loaded = load_classifier(given, 5, seed=0)
    model: Any = loaded.model.eval()
    images = torch.randn(2, 3, *(model.patch_embed.img_size if hasattr(model, "patch_embed") else (32, 32)))
    assert torch.equal(model.forward_features(images), expected.forward_features(images))
    scope: dict[str, Any] = {}
    exec("\n".join(loaded.code), scope)
    assert torch.equal(scope["model"].eval().forward_features(images), expected.forward_features(images))
    assert loaded.fresh_head == (kind in ("MAE", "DINOv2"))
    if not loaded.fresh_head:
        assert torch.equal(model(images), expected(images)) and torch.equal(scope["model"](images), expected(images))
        with pytest.raises(
            ValueError, match="x.pth has a classifier of 5 classes, but the data has 3: give --fresh-head"
        ):
            load_classifier(given, 3, seed=0)


@pytest.mark.parametrize("classes", [3, None])
def test_an_npz_of_the_original_vit(classes: int | None, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = create("vit_tiny_patch16_224", (*VIT, "img_size=16"), num_classes=classes or 0)
    state = {name: (value + torch.randn_like(value)).numpy() for name, value in source.state_dict().items()}
    source.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    block, names = "Transformer/encoderblock_0", {"weight": "kernel", "bias": "bias"}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
    }
    for path, own in (("Transformer/encoder_norm", "norm"), (f"{block}/LayerNorm_0", "blocks.0.norm1"),
                      (f"{block}/LayerNorm_2", "blocks.0.norm2")):  # fmt: skip
        arrays |= {f"{path}/scale": state[f"{own}.weight"], f"{path}/bias": state[f"{own}.bias"]}
    linear = [(f"{block}/MlpBlock_3/Dense_{i}", f"blocks.0.mlp.fc{i + 1}") for i in (0, 1)]
    for path, own in [*linear, *([("head", "head")] if classes else [])]:
        arrays |= {f"{path}/{theirs}": state[f"{own}.{ours}"].T for ours, theirs in names.items()}
    attention = f"{block}/MultiHeadDotProductAttention_1"
    for i, part in enumerate(("query", "key", "value")):
        rows = slice(32 * i, 32 * i + 32)
        arrays[f"{attention}/{part}/kernel"] = state["blocks.0.attn.qkv.weight"][rows].T.reshape(32, 2, 16)
        arrays[f"{attention}/{part}/bias"] = state["blocks.0.attn.qkv.bias"][rows].reshape(2, 16)
    arrays[f"{attention}/out/kernel"] = state["blocks.0.attn.proj.weight"].T.reshape(2, 16, 32)
    arrays[f"{attention}/out/bias"] = state["blocks.0.attn.proj.bias"]
    given = ModelOptions(
        model="vit_tiny_patch16_224",
        model_kwargs=(*VIT, "img_size=16"),
        initial_checkpoint=str(tmp_path / "x.npz"),
    )
    np.savez(tmp_path / "x.npz", **arrays)
    loaded = load_classifier(given, 3, seed=0)
    model: Any = loaded.model
    scope: dict[str, Any] = {}
    exec("\n".join(loaded.code), scope)
    for found in (model, scope["model"]):
        own = found.state_dict()
        assert all(np.array_equal(own[name], value) for name, value in state.items())
    assert loaded.fresh_head == (classes is None)
    more = dataclasses.replace(given, model_kwargs=(*given.model_kwargs, "init_values=1e-5"))
    with pytest.raises(ValueError, match="x.npz does not fit the model: it lacks blocks.0.ls1.gamma"):
        load_classifier(more, 3, seed=0)
    np.savez(tmp_path / "x.npz", **{name: value for name, value in arrays.items() if name != "cls"})
    with pytest.raises(ValueError, match="x.npz does not fit the model: .*cls"):
        load_classifier(given, 3, seed=0)


def test_a_folder_of_another_size_and_of_grey_images_takes_weights_of_a_file(tmp_path: Path) -> None:
    folder = write_tiny_vit(tmp_path / "vit", 3)
    file = str(tmp_path / "x.safetensors")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, file)
    expected = load_classifier(ModelOptions(model=f"local-dir:{folder}", pretrained=True, img_size=24), 3, seed=0).model
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "model.safetensors")
    given = ModelOptions(model=f"local-dir:{folder}", initial_checkpoint=file, img_size=24)
    loaded = load_classifier(given, 3, seed=0)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [1, 16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_classifier(given, 3, seed=0)
    scope: dict[str, Any] = {}
    exec("\n".join(loaded.code), scope)
    summed = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    changed = {**expected.state_dict(), "patch_embed.proj.weight": summed}
    for model in (loaded.model, scope["model"]):
        assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vit_tiny_patch16_224", {"blocks.0.norm1.weight": None}, "Missing key.*blocks.0.norm1.weight"),
        (
            "vit_tiny_patch16_224",
            {"blocks.0.norm1.weight": None, "head.weight": None},
            "it lacks blocks.0.norm1.weight",
        ),
        ("vit_tiny_patch16_224", {"blocks.0.norm1.weight": torch.ones(8)}, "size mismatch for blocks.0.norm1.weight"),
        ("vit_tiny_patch16_224", {"patch_embed.proj.weight": torch.ones(32, 5, 8, 8)}, "patch_embed.proj.* 5, 8, 8"),
        ("test_convnext", {}, "and timm cannot adapt it"),
        ("test_resnet", {"head.weight": None}, "it lacks conv1"),
    ],
)
def test_files_that_timm_cannot_adapt(name: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    state = create("vit_tiny_patch16_224", (*VIT, "img_size=32"), num_classes=5).state_dict() | change
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "x.safetensors")
    words = (*VIT, "img_size=16") if name.startswith("vit") else ()
    given = ModelOptions(
        model=name, model_kwargs=words, initial_checkpoint=str(tmp_path / "x.safetensors"), fresh_head=True
    )
    with pytest.raises(ValueError, match=f"x.safetensors does not fit the model.*{reason}"):
        load_classifier(given, 3, seed=0)
