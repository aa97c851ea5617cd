"""One small model, with random weights, of every family of timm's that holds its projections in its own way.

timm_table.py writes them up in docs/timm_families.md.
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from randlora_vision.skeletons import skeleton
from tests.copies import template
from tests.zoo.base import numbers, unmute

CLASSES = 8


@dataclass(frozen=True, eq=False)
class Family:
    """How to build a family's small member, by timm's model name and what is changed of it.

    `create` names timm's own factory, ``module.function``, where the named model has no say in its sizes.
    `registered` names the model of ordinary size where `variant` is not one.
    `unreachable` lists regular expressions of weights that cannot change the output.
    """

    name: str
    variant: str
    options: dict[str, Any]
    size: int = 32
    create: str | Callable[..., nn.Module] | None = None
    registered: str = ""
    unreachable: tuple[str, ...] = ()
    slow: bool = False
    rank: int = 4

    @property
    def id(self) -> str:
        return self.name.lower().replace(" ", "_")

    @property
    def full_size(self) -> str:
        """The registered model."""
        return self.registered or self.variant

    def cannot_reach(self, name: str) -> bool:
        """True for a weight, by any name that contains its module's, that does not change the output."""
        return any(re.search(pattern, name) for pattern in self.unreachable)


def build(family: Family, **changes: Any) -> nn.Module:
    """The family's model, in eval mode and without muted branches; the same numbers at every call."""
    return _made(family, **changes) if changes else _kept(family)()


@functools.cache
def _kept(family: Family) -> Callable[[], nn.Module]:
    """A copy takes a fraction of the time of a new one. All of these models together have 50 MB."""
    return template(_made(family))


def _made(family: Family, **changes: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _new(family, **changes)
        unmute(model)
    return model.eval()


def shapes_of(family: Family, **changes: Any) -> nn.Module:
    """The model of `build`, without memory for its weights."""
    return skeleton(lambda: _new(family, **changes))


def _new(family: Family, **changes: Any) -> nn.Module:
    import timm

    make = timm.create_model
    if isinstance(family.create, str):
        module, function = family.create.split(".")
        make = getattr(importlib.import_module(f"timm.models.{module}"), function)
    elif family.create:
        make = family.create
    return make(family.variant, pretrained=False, **{"num_classes": CLASSES, **family.options, **changes})


def make_full_size(variant: str, **options: Any) -> nn.Module:
    """A registered model as it is, without memory for its weights."""
    import timm

    return skeleton(lambda: timm.create_model(variant, pretrained=False, **options))


def images(family: Family, model: nn.Module) -> Tensor:
    """Two fixed images in the model's precision."""
    return numbers(model, 2, 3, family.size, family.size)


def make_mvitv2(variant: str, **options: Any) -> nn.Module:
    """timm's own factory takes the sizes from its registry alone."""
    from timm.models import build_model_with_cfg
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2), stride_q=((1, 1), (2, 2)))
    features = dict(out_indices=2, feature_cls="getter")
    return build_model_with_cfg(MultiScaleVit, variant, model_cfg=config, feature_cfg=features, **options)


# fmt: off
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
MIXER = dict(img_size=32, patch_size=8, embed_dim=32, num_blocks=2)
SWIN = dict(img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4)
PYRAMID = dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2))
STAGES = dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))

_FAMILIES = [
    Family("ViT", "vit_tiny_patch16_224", VIT),
    Family("ViT hybrid", "vit_tiny_r_s16_p8_224",
           dict(img_size=64, embed_dim=32, depth=2, num_heads=2, patch_size=2), 64),
    Family("ViT parallel", "vit_small_patch16_18x2_224", VIT),
    Family("ViT relative position", "vit_relpos_small_patch16_224", VIT),
    Family("ViT-SAM", "samvit_base_patch16", dict(VIT, window_size=2, global_attn_indexes=(1,), neck_chans=16)),
    Family("DeiT distilled", "deit_tiny_distilled_patch16_224", VIT),
    Family("DeiT3", "deit3_small_patch16_224", VIT),
    Family("DINOv2", "vit_small_patch14_reg4_dinov2", VIT),
    Family("DINOv2 SwiGLU", "vit_giant_patch14_reg4_dinov2", VIT),
    Family("DINOv3", "vit_small_patch16_dinov3", VIT),
    Family("DINOv3 qkv bias", "vit_small_patch16_dinov3_qkvb", VIT),
    Family("SigLIP", "vit_base_patch16_siglip_224", VIT),
    Family("Perception Encoder", "vit_pe_core_tiny_patch16_384", VIT),
    Family("BEiT", "beit_base_patch16_224", VIT),
    Family("BEiTv2", "beitv2_base_patch16_224", VIT),
    Family("EVA", "eva_giant_patch14_224", VIT),
    Family("EVA02", "eva02_tiny_patch14_224", VIT),
    Family("EVA02 CLIP", "eva02_base_patch16_clip_224", VIT),
    Family("NaFlexViT", "naflexvit_base_patch16_gap", VIT),
    Family("NaFlexViT MAP", "naflexvit_base_patch16_map", VIT),
    Family("FlexiViT", "flexivit_small", VIT),
    Family("AIMv2", "aimv2_large_patch14_224", VIT),
    Family("ViTamin", "vitamin_small_224", dict(img_size=32, depth=1)),
    Family("Swin", "swin_tiny_patch4_window7_224", SWIN),
    Family("Swin-S3", "swin_s3_tiny_224", SWIN),
    Family("SwinV2", "swinv2_tiny_window8_256", SWIN),
    Family("SwinV2-CR", "swinv2_cr_tiny_224", SWIN),
    Family("CaiT", "cait_xxs24_224", VIT),
    Family("XCiT", "xcit_nano_12_p16_224", dict(img_size=32, embed_dim=32, depth=2, num_heads=2)),
    Family("ConViT", "convit_tiny", dict(VIT, local_up_to_layer=1)),
    Family("CoaT", "coat_tiny", dict(img_size=64, embed_dims=[16] * 4, serial_depths=[1] * 4, parallel_depth=1), 64),
    Family("CrossViT", "crossvit_tiny_240",
           dict(img_size=48, img_scale=(1.0, 1.0), patch_size=(8, 16), embed_dim=(16, 32), depth=((1, 2, 1),),
                num_heads=(2, 2), mlp_ratio=(2, 2, 1)), 48),
    Family("DaViT", "davit_tiny", dict(PYRAMID, window_size=4), 64),
    Family("DeepSeek ViT", "deepseek_vit_412m", dict(VIT)),
    Family("EdgeNeXt", "edgenext_xx_small", dict(STAGES, heads=(2,) * 4), 64),
    Family("EfficientFormer", "efficientformer_l1", dict(depths=(1, 1, 1, 2), embed_dims=(16, 16, 16, 32)), 224),
    Family("EfficientFormerV2", "efficientformerv2_s0",
           dict(img_size=64, depths=(1, 1, 1, 2), embed_dims=(16, 16, 16, 32), num_vit=1, mlp_ratios=2), 64),
    Family("EfficientViT MIT", "efficientvit_b0",
           dict(widths=(16, 16, 16, 32, 32), depths=(1,) * 5, head_widths=(32, 32)), 64),
    Family("EfficientViT MSRA", "efficientvit_m0",
           dict(img_size=64, embed_dim=(32, 32, 48), depth=(1, 1, 1), num_heads=(2, 2, 2), window_size=(2, 2, 2)), 64),
    Family("FastViT", "fastvit_sa12", dict(layers=(1,) * 4, embed_dims=(16, 16, 32, 32)), 64),
    Family("FocalNet", "focalnet_tiny_srf", dict(embed_dim=16, depths=(1, 1)), 64, "focalnet._create_focalnet"),
    Family("GCViT", "gcvit_xxtiny",
           dict(img_size=64, depths=(1, 2), num_heads=(2, 2), embed_dim=16, window_size=(4, 4)), 64,
           "gcvit._create_gcvit", unreachable=(r"stages\.0\.global_block\.",)),
    Family("Gemma 4 ViT", "gemma4_vit_167m", dict(VIT, head_dim=16, intermediate_size=64)),
    Family("Hiera", "hiera_tiny_224",
           dict(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1), q_pool=2), 64),
    Family("HieraDet", "hieradet_small",
           dict(embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), q_pool=2, window_spec=(4, 4, 4, 2),
                global_att_blocks=(3,)), 64),
    Family("LeViT", "levit_128s", dict(img_size=64, embed_dim=(16, 32), num_heads=(2, 2), key_dim=8, depth=(1, 1)), 64),
    Family("MaxViT", "maxvit_tiny_rw_224", dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16), 64),
    Family("CoAtNet", "coatnet_0_rw_224", dict(img_size=64, embed_dim=(32,) * 4, depths=(1,) * 4, stem_width=16), 64),
    Family("MaxxViTV2", "maxxvitv2_nano_rw_256",
           dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16), 64),
    Family("CAFormer", "caformer_s18", STAGES, 64, "metaformer._create_metaformer"),
    Family("PoolFormer", "poolformer_s12", dict(STAGES, use_mlp_head=False), 64, "metaformer._create_metaformer"),
    Family("MobileViT", "mobilevit_xxs", dict(width_factor=0.5), 64),
    Family("MobileViTV2", "mobilevitv2_050", dict(width_factor=0.5), 64),
    Family("MViTv2", "mvitv2_tiny", dict(img_size=32), create=make_mvitv2),
    Family("Nest", "nest_tiny",
           dict(img_size=32, patch_size=4, embed_dims=(16,) * 3, num_heads=(2,) * 3, depths=(1,) * 3),
           create="nest._create_nest"),
    Family("Next-ViT", "nextvit_small", dict(depths=(1, 1, 5, 1), stem_chs=(16, 16, 16), head_dim=16), 64, slow=True),
    Family("PiT", "pit_ti_224",
           dict(img_size=32, patch_size=8, stride=4, base_dims=(8, 16), depth=(1, 1), heads=(2, 2), mlp_ratio=2)),
    Family("PVTv2", "pvt_v2_b0", dict(PYRAMID, mlp_ratios=(2, 2), sr_ratios=(2, 1)), 64),
    Family("Qwen3 ViT", "qwen3_vit_88m", dict(VIT)),
    Family("SHViT", "shvit_s1", dict(embed_dim=(32, 32, 32), depth=(1, 1, 1), partial_dim=(16, 16, 16)), 64),
    Family("SwiftFormer", "swiftformer_xs", dict(layers=(1,) * 4, embed_dims=(16, 16, 32, 32)), 64),
    Family("TinyViT", "tiny_vit_5m_224",
           dict(embed_dims=(16, 16, 32, 32), depths=(1,) * 4, num_heads=(1, 2, 2, 2), window_sizes=(2,) * 4), 64),
    Family("TNT", "tnt_s_patch16_224",
           dict(img_size=32, patch_size=8, embed_dim=32, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=2)),
    Family("Twins", "twins_svt_small",
           dict(PYRAMID, img_size=32, mlp_ratios=(2, 2), depths=(2, 2), sr_ratios=(2, 1), wss=(2, 2))),
    Family("Visformer", "visformer_tiny",
           dict(img_size=64, init_channels=16, embed_dim=32, depth=(1, 1, 1), num_heads=2), 64),
    Family("VOLO", "volo_d1_224",
           dict(img_size=64, layers=(1, 1), embed_dims=(16, 32), num_heads=(2, 2), stem_hidden_dim=8), 64,
           "volo._create_volo"),
    Family("MLP-Mixer", "mixer_s32_224", MIXER, create="mlp_mixer._create_mixer"),
    Family("ResMLP", "resmlp_12_224", MIXER, create="mlp_mixer._create_mixer"),
    Family("gMLP", "gmlp_ti16_224", MIXER, create="mlp_mixer._create_mixer"),
    Family("Sequencer", "sequencer2d_s", dict(layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(8,) * 4), 64),
    Family("ConvNeXt", "convnext_tiny", STAGES, 64),
    Family("ConvNeXtV2", "convnextv2_atto", STAGES, 64),
    Family("InceptionNeXt", "inception_next_atto", STAGES, 64),
    Family("MambaOut", "mambaout_femto", STAGES, 64),
    Family("RepViT", "repvit_m0_9", dict(embed_dim=(16, 16, 32, 32), depth=(1, 1, 1, 1)), 64),
    Family("StarNet", "starnet_s1", dict(base_dim=16, depths=(1, 1, 1)), 64),
    Family("ResNet", "resnet10t", dict(channels=(16, 16, 16, 32)), 64),
    Family("ResNetV2", "resnetv2_50", dict(layers=(1, 1), channels=(64, 64), stem_chs=16), 64),
    Family("ResNet CLIP", "resnet50_clip", dict(img_size=64, width_factor=0.125, stem_chs=(16, 16, 16)), 64),
    Family("BoTNet", "botnet26t_256", dict(img_size=64, width_factor=0.25, stem_chs=16), 64),
    Family("RegNetY", "regnety_002", dict(depth=6, w0=16, wa=24.0, wm=2.0, group_size=8, stem_width=16), 64),
    Family("EfficientNet", "test_efficientnet", {}, 64, registered="efficientnet_b0"),
    Family("MobileNetV4", "mobilenetv4_conv_small_035", {}, 64, registered="mobilenetv4_conv_medium"),
    Family("NFNet", "test_nfnet", {}, 64, registered="dm_nfnet_f0"),
    Family("DenseNet", "densenet121", dict(growth_rate=16, block_config=(1, 1)), 64),
]
# fmt: on

# An older timm lacks these families, or a part of them that the tests take for granted.
_SINCE = {
    "resnet_clip": "1.0.26",
    "gemma_4_vit": "1.0.27",
    "deepseek_vit": "1.0.30",
    "qwen3_vit": "1.0.30",
    "coat": "1.0.31",
    "convit": "1.0.31",
    "crossvit": "1.0.31",
    "inceptionnext": "1.0.31",
    "visformer": "1.0.31",
}
_INSTALLED = Version(metadata.version("timm"))
FAMILY = {family.id: family for family in _FAMILIES}
FAMILIES = [family for family in _FAMILIES if Version(_SINCE.get(family.id, "0")) <= _INSTALLED]
