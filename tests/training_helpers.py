"""What the training tests need on disk and in memory: class folders of real digits, and a tiny CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from randlora_vision.integrations._open_clip_models import LoadedClip, load_clip
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits

TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NO_SKIPS = SkipList()


def write_class_folders(root: Path, per_class: int = 6, classes: Sequence[int] = (0, 1, 2)) -> Path:
    """Write `root/<class name>/<number>.png`, real digits."""
    splits = digits.read_digits(classes)
    for label, name in enumerate(splits.class_names):
        (root / name).mkdir(parents=True)
        chosen = [i for i, other in enumerate(splits.labels["train"]) if other == label][:per_class]
        for number, index in enumerate(chosen):
            splits.images["train"][index].save(root / name / f"{number:03}.png")
    return root


def write_tiny_clip(folder: Path, config: dict[str, Any] = TINY_CONFIG) -> Path:
    """Write a random tiny CLIP as a folder for open_clip's `local-dir:`, and its parts for --model/--pretrained."""
    import open_clip

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bilinear"}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    return folder


def tiny_clip(folder: Path) -> LoadedClip:
    """Load a tiny CLIP, written to `folder` at the first call."""
    if not folder.exists():
        write_tiny_clip(folder)
    return load_clip(f"local-dir:{folder}", None, seed=0)


def write_tiny_vit(folder: Path, classes: int) -> Path:
    """Write a random tiny ViT as a folder for timm's `local-dir:`."""
    import timm

    architecture = "vit_tiny_patch16_224"
    arguments: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=classes, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {
        "input_size": [3, 16, 16],
        "fixed_input_size": True,
        "num_classes": classes,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save every figure as one pixel: drawing takes half of a short run's time. Runs in a separate process draw."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Image.new("RGB", (1, 1)).save(path, "PNG"))
