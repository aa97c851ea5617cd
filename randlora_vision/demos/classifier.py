"""The pretrained model of the classifier demo: a tiny timm ViT trained on the digits 0-4 and cached on disk.

It is saved in the format that timm uses for the hub, so `--model local-dir:<folder>` loads it with the same code as
any other model.
"""

import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose

from randlora_vision.demos.pretraining import Pretraining, cached_folder, teach
from randlora_vision.training.data.labelled import Batch
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.sources.digits import KNOWN_DIGITS

_ARCHITECTURE = "vit_tiny_patch16_224"
_MODEL_ARGS = {"img_size": digits.IMAGE_SIZE, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
_PRETRAINED_CFG: dict[str, Any] = {
    "input_size": [3, digits.IMAGE_SIZE, digits.IMAGE_SIZE],
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": len(KNOWN_DIGITS),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
_PRETRAINING = Pretraining(steps=200)


def demo_model_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of the demo model, pretrained first if it is not cached for these versions of its libraries."""
    settings = {
        "architecture": _ARCHITECTURE,
        "model_args": _MODEL_ARGS,
        "pretrained_cfg": _PRETRAINED_CFG,
        "pretraining": asdict(_PRETRAINING),
        "digits": list(KNOWN_DIGITS),
        "versions": {name: metadata.version(name) for name in ("torch", "timm", "scikit-learn")},
    }
    return cached_folder("digits-vit", settings, lambda folder: _save(_pretrain(), folder, settings), cache_dir)


def _pretrain() -> nn.Module:
    """Train the tiny ViT from scratch on the upright digits 0-4, on the CPU, in float32, with a fixed seed."""
    import timm
    from timm.data import create_transform, resolve_data_config

    known = digits.read_digits(KNOWN_DIGITS)
    evaluation = create_transform(**resolve_data_config(pretrained_cfg=_PRETRAINED_CFG))
    data = known.select("train", Compose([known.augment, evaluation]), SkipList())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_PRETRAINING.seed)
        model = timm.create_model(_ARCHITECTURE, num_classes=len(KNOWN_DIGITS), **_MODEL_ARGS)

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch["images"]), batch["labels"])

        teach(model.parameters(), loss, data, _PRETRAINING)
    return model.eval()


def _save(model: nn.Module, folder: Path, settings: dict[str, Any]) -> None:
    """Write the model in the `local-dir:` format of timm, together with the settings that produced it."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": _ARCHITECTURE,
        "num_classes": len(KNOWN_DIGITS),
        "model_args": _MODEL_ARGS,
        "pretrained_cfg": _PRETRAINED_CFG,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
