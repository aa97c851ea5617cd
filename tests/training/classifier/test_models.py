"""Loading timm models: weights without a classifier, grey models, and image sizes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from randlora_vision.training.classifier.models import load_classifier
from randlora_vision.training.classifier.options import AugmentOptions, ClassifierOptions, ModelOptions
from randlora_vision.training.classifier.timm_flags import TIMM
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.harness.options import parse
from tests.training_helpers import write_tiny_vit

WITH_OTHERS = {"mask_token": torch.zeros(1, 1, 8), "decoder.weight": torch.zeros(3, 3), "dino_head.mlp": torch.ones(2)}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("others", [{}, WITH_OTHERS])
def test_weights_without_a_classifier(name: str, others: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = timm.create_model(name, num_classes=0).eval()
    path = tmp_path / "x.safetensors"
    save_file({**base.state_dict(), **others}, path)
    loaded = load_classifier(ModelOptions(model=name, initial_checkpoint=str(path)), 7, seed=0)
    model: Any = loaded.model.eval()
    images = torch.randn(2, *loaded.data_config["input_size"])
    assert loaded.fresh_head and model(images).shape == (2, 7)
    torch.testing.assert_close(model.forward_features(images), base.forward_features(images))
    again = load_classifier(ModelOptions(model=name, initial_checkpoint=str(path), fresh_head=True), 7, seed=0).model
    torch.testing.assert_close(again.eval()(images), model(images), rtol=0, atol=0)
    namespace: dict[str, Any] = {}
    exec("\n".join(loaded.code), namespace)  # the printed code gives the same backbone
    torch.testing.assert_close(namespace["model"].eval().forward_features(images), base.forward_features(images))


def test_arguments_of_the_model_reach_it_and_the_code() -> None:
    words = ("patch_size=8", "embed_dim=32", "depth=1", "num_heads=2", "img_size=16", "act_layer=silu")
    loaded = load_classifier(ModelOptions(model="vit_tiny_patch16_224", model_kwargs=words), 3, seed=0)
    model: Any = loaded.model
    assert model.patch_embed.patch_size == (8, 8) and isinstance(model.blocks[0].mlp.act, torch.nn.SiLU)
    scope: dict[str, Any] = {}
    exec("\n".join(loaded.code), scope)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.blocks.parameters(), scope["model"].blocks.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="timm cannot create .* with .*no_such=1"):
        load_classifier(ModelOptions(model="vit_tiny_patch16_224", model_kwargs=("no_such=1",)), 3, seed=0)


def test_weights_that_lack_part_of_the_backbone(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file({name: value for name, value in state.items() if "blocks.1" not in name}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors does not fit the model: it lacks blocks.1.norm1.weight"):
        load_classifier(ModelOptions(model="test_vit", initial_checkpoint=str(tmp_path / "x.safetensors")), 3, seed=0)


def grey_model(folder: Path, channels: int = 1) -> str:
    write_tiny_vit(folder, 3)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["in_chans"] = channels
    config["pretrained_cfg"] |= {"input_size": [channels, 16, 16], "mean": [0.5], "std": [0.25]}
    model = timm.create_model(config["architecture"], num_classes=3, **config["model_args"])
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_a_grey_model_gets_grey_images(tmp_path: Path) -> None:
    loaded = load_classifier(ModelOptions(model=grey_model(tmp_path / "grey"), pretrained=True), 3, seed=0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    splits = ImageSplits(name="x", class_names=["a"], images={}, labels={}, origin="")
    augmented = loaded.training_transform(
        splits, AugmentOptions(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    )
    assert augmented(picture).shape == (1, 16, 16)
    from torchvision.transforms import CenterCrop, Resize

    config = loaded.data_config
    scaled = CenterCrop(16)(Resize(int(16 / config["crop_pct"]), interpolation=3)(picture))
    truth = (np.asarray(scaled) @ [0.299, 0.587, 0.114] / 255 - 0.5) / 0.25
    found = loaded.eval_transform(picture)
    assert found.shape == (1, 16, 16) and np.abs(found[0].numpy() - truth).max() < 1e-4
    assert loaded.model(found[None]).shape == (1, 3)
    larger = ModelOptions(model=f"local-dir:{tmp_path / 'grey'}", pretrained=True, img_size=24, mean=(0.3,))
    loaded = load_classifier(larger, 3, seed=0)
    assert loaded.data_config["input_size"] == (1, 24, 24)
    assert loaded.model(loaded.eval_transform(picture)[None]).shape == (1, 3)
    with pytest.raises(ValueError, match="takes images of 4 channels, not of 1 .grey. or 3"):
        load_classifier(ModelOptions(model=grey_model(tmp_path / "four", 4), pretrained=True), 3, seed=0)


def test_image_sizes_of_models_in_folders(tmp_path: Path) -> None:
    vit = f"local-dir:{write_tiny_vit(tmp_path / 'vit', 3)}"
    model = timm.create_model("test_resnet", num_classes=3)
    (tmp_path / "resnet").mkdir()
    save_file(model.state_dict(), tmp_path / "resnet" / "model.safetensors")
    pretrained = {"input_size": [3, 160, 160], "num_classes": 3, "classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": pretrained}
    (tmp_path / "resnet" / "config.json").write_text(json.dumps(config))
    for name in (vit, f"local-dir:{tmp_path / 'resnet'}"):
        loaded = load_classifier(ModelOptions(model=name, pretrained=True, img_size=64), 3, seed=0)
        assert loaded.data_config["input_size"] == (3, 64, 64)
        assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="timm cannot create the model 'local-dir:.*nowhere'"):
        load_classifier(ModelOptions(model=f"local-dir:{tmp_path / 'nowhere'}", img_size=64), 3, seed=0)


FLAGS: dict[str, dict[str, Any]] = {
    "--crop-pct 0.5 --mean 0.1 --std 0.2 0.3 0.4 --interpolation nearest": {
        "crop_pct": 0.5,
        "mean": [0.1],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "nearest",
    },
    "--mean 0 0.5 1 --img-size 48": {"mean": [0, 0.5, 1], "img_size": 48},
    "--std=0.5 --crop-pct=1": {"std": [0.5], "crop_pct": 1.0},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_preprocessing_have_timms_meanings(flags: str) -> None:
    given = parse(ClassifierOptions, ["folder", "--model", "test_resnet", *flags.split()], "A test.", TIMM)
    loaded = load_classifier(given.model, 3, seed=0)
    config = timm.data.resolve_data_config(FLAGS[flags], model=timm.create_model("test_resnet"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8))
    splits = ImageSplits(name="x", class_names=["a"], images={}, labels={}, origin="")
    truth = timm.data.create_transform(**config)(picture)
    assert torch.equal(loaded.eval_transform(picture), truth)
    train = timm.data.create_transform(**{**config, "crop_pct": None, "crop_mode": None}, is_training=True)
    for own, theirs in (
        (loaded.training_transform(splits, AugmentOptions()), train),
        (
            loaded.training_transform(splits, AugmentOptions(no_aug=True)),
            timm.data.create_transform(**config, is_training=True, no_aug=True),
        ),
    ):
        results = []
        for transform in (own, theirs):
            random.seed(1)
            torch.manual_seed(1)
            results.append(transform(picture))
        assert torch.equal(*results)
    kept = loaded.preprocessing(splits, AugmentOptions(no_aug=True), "white")
    assert {**kept["evaluation"], "background": None} == {**config, "background": None}
    assert kept["training"] == {"no_aug": True}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--crop-pct 87.5", "--crop-pct must be above 0 and at most 1, got 87.5"),
        ("--mean 123.7 116.3 103.5", "--mean must be one or three numbers from 0 to 1, got 123.7 116.3 103.5"),
        ("--std 0.2 0.3", "--std must be one or three numbers"),
        ("--std 0.2 0 0.2", "--std must be above 0"),
        ("--no-aug --aa rand-m9", "--no-aug excludes --auto-augment"),
        ("--interpolation cubic", "cubic"),
    ],
)
def test_flags_of_preprocessing_that_cannot_be_meant(flags: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(ClassifierOptions, ["folder", "--model", "x", *flags.split()], "A test.", TIMM)
