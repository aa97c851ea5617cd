"""open_clip: the towers and poolings that keep their projections in different places."""

import tempfile
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.zoo.base import Build, Entry, Run, entry, flat, numbers, tokens

Options = dict[str, Any]

SIZE, LENGTH, VOCABULARY, WIDTH = 32, 8, 32, 32

# fmt: off
VISION = dict(layers=2, width=WIDTH, head_width=16, patch_size=8, image_size=SIZE)
TEXT = dict(context_length=LENGTH, vocab_size=VOCABULARY, width=WIDTH, heads=2, layers=2)
SIGLIP_TEXT = dict(TEXT, no_causal_mask=True, proj_bias=True, pool_type="last")
QUERIES = dict(attn_pooler_queries=4, attn_pooler_heads=2)
CUSTOM = dict(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True)
HF_T5 = dict(d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
HF_BERT = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
               max_position_embeddings=LENGTH + 2)
# fmt: on


def clip(kind: str = "CLIP", *, vision: Options = VISION, text: Options = TEXT, **options: Any) -> nn.Module:
    import open_clip

    return getattr(open_clip, kind)(vision_cfg=vision, text_cfg=text, **{"embed_dim": 16, **options})


def clip_with_timm(tower: str, sizes: Options, text: Options = TEXT, **vision: Any) -> nn.Module:
    """open_clip builds a timm tower by its name alone, at full size: give `create_model` the small sizes."""
    import timm

    small = partial(timm.create_model, **sizes)
    with mock.patch("timm.create_model", small):
        vision = {"timm_model_name": tower, "image_size": SIZE} | vision
        return clip("CustomTextCLIP", vision=vision, text=text)


def clip_with_hf(kind: str, **text: Any) -> nn.Module:
    """open_clip reads the text tower's configuration from a name: a folder will do, and needs no network."""
    import transformers

    sizes = HF_T5 if kind == "mt5" else HF_BERT
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **sizes).save_pretrained(folder)
        return clip("CustomTextCLIP", text={"hf_model_name": folder, "hf_model_pretrained": False} | text)


def coca(**vision: Any) -> nn.Module:
    vision = VISION | QUERIES | {"attentional_pool": True, "output_tokens": True} | vision
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    model = clip("CoCa", vision=vision, text=text, multimodal_cfg=TEXT, embed_dim=WIDTH)
    nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # left uninitialised by open_clip
    return model


def texts() -> Tensor:
    ids = tokens(3, LENGTH, vocabulary=VOCABULARY)
    # The end of the text, as the highest id, in another place each: CLIP pools there.
    ids[torch.arange(3), torch.tensor([LENGTH - 1, LENGTH - 2, LENGTH - 1])] = VOCABULARY - 1
    return ids


def run(model: nn.Module) -> Tensor:
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return flat(model.encode_image(numbers(model, 2, 3, height, width)), model.encode_text(texts()))


def run_coca(model: nn.Module) -> Tensor:
    output = model(numbers(model, 3, 3, SIZE, SIZE), texts())
    return flat(output["image_features"], output["text_features"], output["logits"])


def pair(name: str, make: Build, run: Run = run, **zoo: Any) -> Entry:
    return entry(f"open_clip/{name}", make, run, **zoo)


# fmt: off
TIMM_VIT = dict(img_size=SIZE, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2)
TIMM_CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32))
TIMM_RESNET = dict(channels=(8, 8, 16, 64))
SCALED = dict(ls_init_value=1e-5)

ENTRIES = [
    pair("vit", clip),
    pair("vit_quick_gelu", partial(clip, quick_gelu=True)),
    pair("vit_layer_scale", partial(clip, vision=VISION | SCALED, text=TEXT | SCALED)),
    pair("custom_text", partial(clip, "CustomTextCLIP")),
    pair("custom_text_bias", partial(clip, "CustomTextCLIP", text=SIGLIP_TEXT, init_logit_bias=-10.0)),
    pair("custom_block", partial(clip, "CustomTextCLIP", vision=VISION | CUSTOM, text=TEXT | CUSTOM)),
    pair("attentional_pool", partial(clip, vision=VISION | QUERIES | {"attentional_pool": True})),
    pair("average_pool", partial(clip, vision=VISION | {"pool_type": "avg", "final_ln_after_pool": True})),
    pair("modified_resnet", partial(clip, vision=dict(layers=[1] * 4, width=8, head_width=64, image_size=64))),
    pair("coca", coca, run_coca),
    pair("coca_cascade", partial(coca, attentional_pool="cascade"), run_coca),
    pair("siglip_map", partial(clip_with_timm, "vit_base_patch16_siglip_224", TIMM_VIT, SIGLIP_TEXT, timm_pool="map",
                               timm_proj="none")),
    pair("timm_vit", partial(clip_with_timm, "vit_tiny_patch16_224", TIMM_VIT, timm_pool="token", timm_proj="mlp")),
    pair("timm_convnext", partial(clip_with_timm, "convnext_atto", TIMM_CONVNEXT, timm_pool="", timm_proj="linear")),
    pair("timm_eva02", partial(clip_with_timm, "eva02_base_patch16_clip_224", TIMM_VIT, timm_pool="token")),
    pair("timm_rot_attn_pool", partial(clip_with_timm, "resnet10t", TIMM_RESNET, timm_pool="rot_attn", timm_proj="")),
    pair("hf_roberta", partial(clip_with_hf, "roberta")),
    pair("hf_bert_cls", partial(clip_with_hf, "bert", hf_pooler_type="cls_pooler", hf_proj_type="linear")),
    pair("hf_mt5", partial(clip_with_hf, "mt5", hf_proj_type="linear"), float32_inside=True),
]
# fmt: on
