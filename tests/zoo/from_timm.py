"""timm: what its presets leave out, such as stems and resampled weights; test_timm_zoo.py goes through all families."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import Entry, entry, numbers


def make(model: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(model, pretrained=False, num_classes=8, **options)


def run_patches(model: nn.Module) -> Tensor:
    """NaFlexViT on 3 x 3 patches of another size than its own: it resamples the embedding's weight."""
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, 9, 2)
    patches = numbers(model, 2, 9, 6, 6, 3)
    return model({"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones(2, 9, dtype=torch.bool)})


def run(model: nn.Module, size: int) -> Tensor:
    return model(numbers(model, 2, 3, size, size))


def image_model(name: str, model: str, options: dict[str, Any], size: int = 32, **zoo: Any) -> Entry:
    return entry(f"timm/{name}", partial(make, model, options), partial(run, size=size), **zoo)


# fmt: off
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
STAGES = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32))

ENTRIES = [
    image_model("vit", "vit_tiny_patch16_224", VIT),
    image_model("convnext", "convnext_atto", STAGES, size=64, target="all"),
    image_model("sequencer", "sequencer2d_s",
                dict(layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(8,) * 4), size=64),
    entry("timm/naflexvit_resampled",
          partial(make, "naflexvit_base_patch16_gap", dict(VIT, enable_patch_interpolator=True)), run_patches),
]
# fmt: on
