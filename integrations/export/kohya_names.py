"""The names that kohya's sd-scripts and musubi-tuner give to the layers of diffusers' models.

Both tools name a layer after its path in the code that the model was published with, where some layers are stacked that
diffusers separates. ComfyUI reads these names too, except those of HunyuanVideo and Z-Image, which it spells otherwise.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

# Groups of: prefix of kohya's names, prefix of the paths in diffusers, and the layers of which a name is the stack.
# A # stands for the number of a block.
_Table = tuple[tuple[str, str, dict[str, str]], ...]
# fmt: off
_JOINT = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v", "img_attn_proj": "attn.to_out.0",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn_proj": "attn.to_add_out",
}
_FINAL = {"final_layer_adaLN_modulation_1": "norm_out.linear", "final_layer_linear": "proj_out"}
_FLUX: _Table = (
    ("double_blocks_#_", "transformer_blocks.#.", _JOINT | {
        "img_mlp_0": "ff.net.0.proj", "img_mlp_2": "ff.net.2", "img_mod_lin": "norm1.linear",
        "txt_mlp_0": "ff_context.net.0.proj", "txt_mlp_2": "ff_context.net.2", "txt_mod_lin": "norm1_context.linear"}),
    ("single_blocks_#_", "single_transformer_blocks.#.", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out", "modulation_lin": "norm.linear"}),
    ("", "", _FINAL | {"img_in": "x_embedder", "txt_in": "context_embedder"}),
    ("time_in_", "time_text_embed.timestep_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("vector_in_", "time_text_embed.text_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("guidance_in_", "time_text_embed.guidance_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
)
_CHROMA: _Table = (
    *_FLUX[:3],
    ("distilled_guidance_layer_", "distilled_guidance_layer.", {"in_proj": "in_proj", "out_proj": "out_proj"}),
    ("distilled_guidance_layer_layers_#_", "distilled_guidance_layer.layers.#.", {
        "in_layer": "linear_1", "out_layer": "linear_2"}),
)
_FLUX2: _Table = (
    ("double_blocks_#_", "transformer_blocks.#.", _JOINT | {
        "img_mlp_0": "ff.linear_in", "img_mlp_2": "ff.linear_out",
        "txt_mlp_0": "ff_context.linear_in", "txt_mlp_2": "ff_context.linear_out"}),
    ("single_blocks_#_", "single_transformer_blocks.#.", {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}),
    ("", "", _FINAL | {"img_in": "x_embedder", "txt_in": "context_embedder"}),
    ("time_in_", "time_guidance_embed.timestep_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("guidance_in_", "time_guidance_embed.guidance_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("", "", {f"{part}_lin": f"{part}.linear" for part in (
        "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")}),
)
_SD3: _Table = (
    ("joint_blocks_#_x_block_", "transformer_blocks.#.", {
        "attn_qkv": "attn.to_q attn.to_k attn.to_v", "attn_proj": "attn.to_out.0",
        "attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v", "attn2_proj": "attn2.to_out.0",
        "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2", "adaLN_modulation_1": "norm1.linear"}),
    ("joint_blocks_#_context_block_", "transformer_blocks.#.", {
        "attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn_proj": "attn.to_add_out",
        "mlp_fc1": "ff_context.net.0.proj", "mlp_fc2": "ff_context.net.2",
        "adaLN_modulation_1": "norm1_context.linear"}),
    ("", "", _FINAL | {"context_embedder": "context_embedder", "x_embedder_proj": "pos_embed.proj"}),
    ("t_embedder_", "time_text_embed.timestep_embedder.", {"mlp_0": "linear_1", "mlp_2": "linear_2"}),
    ("y_embedder_", "time_text_embed.text_embedder.", {"mlp_0": "linear_1", "mlp_2": "linear_2"}),
)
_HUNYUAN_VIDEO: _Table = (
    ("double_blocks_#_", "transformer_blocks.#.", _JOINT | {
        "img_mlp_fc1": "ff.net.0.proj", "img_mlp_fc2": "ff.net.2", "img_mod_linear": "norm1.linear",
        "txt_mlp_fc1": "ff_context.net.0.proj", "txt_mlp_fc2": "ff_context.net.2",
        "txt_mod_linear": "norm1_context.linear"}),
    ("single_blocks_#_", "single_transformer_blocks.#.", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out",
        "modulation_linear": "norm.linear"}),
    ("", "", _FINAL | {"img_in_proj": "x_embedder.proj", "txt_in_input_embedder": "context_embedder.proj_in"}),
    ("txt_in_individual_token_refiner_blocks_#_", "context_embedder.token_refiner.refiner_blocks.#.", {
        "self_attn_qkv": "attn.to_q attn.to_k attn.to_v", "self_attn_proj": "attn.to_out.0",
        "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2", "adaLN_modulation_1": "norm_out.linear"}),
    ("txt_in_t_embedder_", "context_embedder.time_text_embed.timestep_embedder.", {
        "mlp_0": "linear_1", "mlp_2": "linear_2"}),
    ("txt_in_c_embedder_", "context_embedder.time_text_embed.text_embedder.", {
        "linear_1": "linear_1", "linear_2": "linear_2"}),
    ("time_in_", "time_text_embed.timestep_embedder.", {"mlp_0": "linear_1", "mlp_2": "linear_2"}),
    ("vector_in_", "time_text_embed.text_embedder.", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    ("guidance_in_", "time_text_embed.guidance_embedder.", {"mlp_0": "linear_1", "mlp_2": "linear_2"}),
)
_WAN: _Table = (
    ("blocks_#_", "blocks.#.", {
        "self_attn_q": "attn1.to_q", "self_attn_k": "attn1.to_k", "self_attn_v": "attn1.to_v",
        "self_attn_o": "attn1.to_out.0", "cross_attn_q": "attn2.to_q", "cross_attn_k": "attn2.to_k",
        "cross_attn_v": "attn2.to_v", "cross_attn_o": "attn2.to_out.0", "cross_attn_k_img": "attn2.add_k_proj",
        "cross_attn_v_img": "attn2.add_v_proj", "ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2"}),
    ("", "", {"patch_embedding": "patch_embedding", "head_head": "proj_out"}),
    ("", "condition_embedder.", {
        "time_embedding_0": "time_embedder.linear_1", "time_embedding_2": "time_embedder.linear_2",
        "text_embedding_0": "text_embedder.linear_1", "text_embedding_2": "text_embedder.linear_2",
        "time_projection_1": "time_proj", "img_emb_proj_1": "image_embedder.ff.net.0.proj",
        "img_emb_proj_3": "image_embedder.ff.net.2"}),
)
_LUMINA2: _Table = (
    *((f"{blocks}_#_", f"{blocks}.#.", {
        "attention_qkv": "attn.to_q attn.to_k attn.to_v", "attention_out": "attn.to_out.0",
        "feed_forward_w1": "feed_forward.linear_1", "feed_forward_w2": "feed_forward.linear_2",
        "feed_forward_w3": "feed_forward.linear_3", "adaLN_modulation_1": "norm1.linear"})
      for blocks in ("layers", "noise_refiner", "context_refiner")),
    ("", "", {"x_embedder": "x_embedder", "cap_embedder_1": "time_caption_embed.caption_embedder.1",
              "final_layer_adaLN_modulation_1": "norm_out.linear_1", "final_layer_linear": "norm_out.linear_2"}),
    ("t_embedder_", "time_caption_embed.timestep_embedder.", {"mlp_0": "linear_1", "mlp_2": "linear_2"}),
)
# fmt: on
_TABLES = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX2,
    "SD3Transformer2DModel": _SD3,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "WanTransformer3DModel": _WAN,
    "Lumina2Transformer2DModel": _LUMINA2,
}
_SCALE_FIRST = ("AdaLayerNormContinuous",)
"""Owners of a modulation whose halves are scale and shift; the original code has shift and scale."""
_PUBLISHED_IN_DIFFUSERS = ("QwenImageTransformer2DModel", "ZImageTransformer2DModel")
_UNET = re.compile(
    r"((down_blocks\.\d+|up_blocks\.\d+|mid_block)\."
    r"(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv|attentions\.\d+\.(proj_in|"
    r"proj_out|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))))"
    r"|conv_in|conv_out|(time|add|class)_embedding\.linear_[12])"
)
# kohya's files use the original names for these two SDXL layers, even where the others have diffusers' names.
_UNET_NAMES = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}


class Stack(NamedTuple):
    """A layer of the original model: its name, the paths in diffusers, and whether its halves are in reverse order."""

    name: str
    paths: tuple[str, ...]
    swapped: bool = False


def stack_of(model: nn.Module, path: str) -> Stack | None:
    """Return the original layer that a layer of a diffusers model belongs to; None if kohya's tools have no name."""
    kind = type(model).__name__
    if kind in _PUBLISHED_IN_DIFFUSERS:
        return Stack(path.replace(".", "_"), (path,))
    if kind == "UNet2DConditionModel":
        return Stack(_UNET_NAMES.get(path, path.replace(".", "_")), (path,)) if _UNET.fullmatch(path) else None
    block = re.search(r"\.(\d+)\.", path)
    number = block[1] if block else ""
    for names, paths, layers in _TABLES.get(kind, ()):
        for name, parts in layers.items():
            found = tuple((paths + part).replace("#", number) for part in parts.split())
            if path in found:
                owner = model.get_submodule(path.rpartition(".")[0])
                return Stack((names + name).replace("#", number), found, type(owner).__name__ in _SCALE_FIRST)
    return None
