"""timm: one small model per way of holding projections; test_timm_zoo.py goes through all families."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import Entry, entry, numbers


def make(model: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(model, pretrained=False, num_classes=8, **options)


def make_mobilevit() -> nn.Module:
    from timm.models.byobnet import ByobNet, ByoModelCfg
    from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block

    stages = (
        _inverted_residual_block(d=1, c=8, s=1, br=2.0),
        _mobilevit_block(d=1, c=16, s=2, transformer_dim=16, transformer_depth=1, patch_size=2, br=2.0),
    )
    config = ByoModelCfg(blocks=stages, stem_chs=8, stem_type="3x3", stem_pool="", act_layer="silu")
    return ByobNet(config, num_classes=8)


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
SWIN = dict(img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4)
STAGES = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32))

ENTRIES = [
    image_model("vit", "vit_tiny_patch16_224", VIT),
    image_model("vit_siglip_map", "vit_base_patch16_siglip_224", VIT),
    image_model("vit_relpos", "vit_relpos_small_patch16_224", VIT),
    image_model("beit", "beit_base_patch16_224", VIT),
    image_model("eva02", "eva02_tiny_patch14_224", VIT),
    image_model("dinov3_qkvb", "vit_small_patch16_dinov3_qkvb", VIT),
    image_model("naflexvit_map", "naflexvit_base_patch16_map", VIT),
    image_model("swinv2", "swinv2_tiny_window8_256", SWIN),
    image_model("convnext", "convnext_atto", STAGES, size=64, target="all"),
    image_model("coatnet", "coatnet_nano_rw_224",
                dict(img_size=64, embed_dim=(32,) * 4, depths=(1,) * 4, stem_width=8), size=64, target="all"),
    image_model("xcit", "xcit_nano_12_p16_224", dict(img_size=32, embed_dim=32, depth=2, num_heads=2)),
    image_model("hiera", "hiera_tiny_224",
                dict(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1), q_pool=2), size=64),
    image_model("resnet", "resnet10t", dict(channels=(8, 8, 16, 16)), size=64, target="all"),
    image_model("levit", "levit_128s",
                dict(img_size=64, embed_dim=(16, 32), num_heads=(2, 2), key_dim=8, depth=(1, 1)), size=64),
    image_model("sequencer", "sequencer2d_s",
                dict(layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(8,) * 4), size=64),
    image_model("tiny_vit", "tiny_vit_5m_224",
                dict(embed_dims=(16, 16, 32, 32), depths=(1,) * 4, num_heads=(1, 2, 2, 2), window_sizes=(2,) * 4),
                size=64),
    entry("timm/naflexvit_resampled",
          partial(make, "naflexvit_base_patch16_gap", dict(VIT, enable_patch_interpolator=True)), run_patches),
    entry("timm/mobilevit", make_mobilevit, partial(run, size=32), target="all"),
]
# fmt: on
