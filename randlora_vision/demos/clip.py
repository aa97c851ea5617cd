"""The pretrained model of the CLIP demo: a tiny open_clip model trained on the digits 0-4 and cached on disk.

It uses the standard classes and tokenizer of open_clip and is saved in the open_clip format, so
`--model local-dir:<folder>` loads it with the same code as any other model.
"""

import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import Compose

from randlora_vision.demos.pretraining import Pretraining, cached_folder, teach
from randlora_vision.training.clip.contrastive import softmax_loss
from randlora_vision.training.data.labelled import Batch
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.sources.digits import KNOWN_DIGITS

_MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
_PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
_PRETRAINING = Pretraining(steps=150)


def demo_model_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of the demo model, pretrained first if it is not cached for these versions of its libraries."""
    settings = {
        "model": _MODEL_CONFIG,
        "preprocess": _PREPROCESS,
        "pretraining": asdict(_PRETRAINING),
        "digits": list(KNOWN_DIGITS),
        "templates": list(digits.TEMPLATES),
        "versions": {name: metadata.version(name) for name in ("torch", "open_clip_torch", "scikit-learn")},
    }
    return cached_folder("digits-clip", settings, lambda folder: _save(_pretrain(), folder, settings), cache_dir)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, captions: Tensor) -> Tensor:
    """Return the CLIP loss (a scalar) in which pairs with the same caption are not negatives of each other.

    The features `images` and `texts` (B, D) have unit length; equal ids in `captions` (B,) mean equal captions.
    If no caption repeats, this is the standard CLIP loss.
    """
    logits = scale * images @ texts.T
    same = captions[:, None] == captions
    return (softmax_loss(logits, same) + softmax_loss(logits.T, same)) / (2 * len(captions))


def _pretrain() -> torch.nn.Module:
    """Train the tiny CLIP from scratch on the captioned upright digits 0-4: CPU, float32, fixed seed."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(size=digits.IMAGE_SIZE, **_PREPROCESS), is_train=False)
    known = digits.read_digits(KNOWN_DIGITS)
    data = known.select("train", Compose([known.augment, preprocess]), SkipList())
    context = _MODEL_CONFIG["text_cfg"]["context_length"]
    tokens = open_clip.SimpleTokenizer(context_length=context)(
        [template.format(digits.NAMES[digit]) for digit in KNOWN_DIGITS for template in digits.TEMPLATES]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_PRETRAINING.seed)
        model = open_clip.CLIP(**_MODEL_CONFIG)

        def loss(batch: Batch) -> Tensor:
            labels = batch["labels"]
            captions = labels * len(digits.TEMPLATES) + torch.randint(len(digits.TEMPLATES), labels.shape)
            text_features = model.encode_text(tokens, normalize=True)[captions]  # each distinct caption is encoded once
            image_features = model.encode_image(batch["images"], normalize=True)
            return contrastive_loss(image_features, text_features, model.logit_scale.exp(), captions)

        # These are three quarters of the weights, but few rows are used: freezing them makes a step four times faster.
        model.token_embedding.requires_grad_(False)
        teach(model.parameters(), loss, data, _PRETRAINING)
    return model.eval()


def _save(model: torch.nn.Module, folder: Path, settings: dict[str, Any]) -> None:
    """Write the model in the local-dir format of open_clip, together with the settings that produced it."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": _MODEL_CONFIG, "preprocess_cfg": _PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
