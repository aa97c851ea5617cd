"""DINOv2 ViT-S/14 out of an ONNX graph, under timm's names, and the timm model that it fits.

Norms, biases, layer scales, class token and patch embedding carry Hugging Face's names in the graph. The weight of a
linear layer is anonymous: it is the second input of the product whose result the bias of that layer is added to.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCKS = 12
_GRID = ("onnx::Concat_1957", "onnx::Reshape_1962")  # position embedding of the class token, and of 37 x 37 patches
_PREFIX = "backbone."


def read_dinov2(graph_bytes: bytes) -> dict[str, Tensor]:
    """Return the state of timm's `vit_small_patch14_dinov2` without a head."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(graph_bytes).graph
    held = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def weight(bias: str) -> Tensor:
        (addition,) = (node for node in graph.node if node.op_type == "Add" and bias in node.input)
        (product,) = (name for name in addition.input if name != bias)
        return held[makers[product].input[1]].T

    embeddings = f"{_PREFIX}embeddings."
    state = {
        "cls_token": held[f"{embeddings}cls_token"],
        "pos_embed": torch.cat([held[name] for name in _GRID], 1),
        "patch_embed.proj.weight": held[f"{embeddings}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held[f"{embeddings}patch_embeddings.projection.bias"],
        "norm.weight": held[f"{_PREFIX}layernorm.weight"],
        "norm.bias": held[f"{_PREFIX}layernorm.bias"],
    }
    for block in range(_BLOCKS):
        source, ours = f"{_PREFIX}encoder.layer.{block}.", f"blocks.{block}."
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[ours + name] = held[source + name]
        for number in (1, 2):
            state[f"{ours}ls{number}.gamma"] = held[f"{source}layer_scale{number}.lambda1"]
        biases = [f"{source}attention.attention.{name}.bias" for name in ("query", "key", "value")]
        state[f"{ours}attn.qkv.bias"] = torch.cat([held[bias] for bias in biases])
        state[f"{ours}attn.qkv.weight"] = torch.cat([weight(bias) for bias in biases])
        for name, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{ours}{name}.bias"] = held[f"{source}{theirs}.bias"]
            state[f"{ours}{name}.weight"] = weight(f"{source}{theirs}.bias")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def load_dinov2(folder: Path, pixels: int) -> nn.Module:
    """Return DINOv2-S without a head for square pictures of `pixels`; the position grid is resized by timm."""
    import timm

    overlay: dict[str, Any] = {"file": str(folder / "dinov2.safetensors")}
    return timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, num_classes=0, img_size=pixels, pretrained_cfg_overlay=overlay
    )
