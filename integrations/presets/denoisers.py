"""The weights of a denoiser or text encoder that the diffusers presets choose.

One rule applies to UNets and transformers of all families. The body of a denoiser consists of the blocks at its root:
modules named so, and modules that contain an attention. Embeddings of time, text and pixels and the last projection are
outside the body. Inside it, modulation layers, which turn the time embedding into shifts and scales, are skipped, and
so are the layers that an IP-Adapter adds: they are loaded later or not at all, and belong to it.
"""

import re
from collections.abc import Mapping

from torch import nn

from randlora_vision.injection.changes import replaced_projections
from randlora_vision.integrations.presets.towers import NARROWEST, Matrix, in_attention, matrices, parents
from randlora_vision.layers.peft_around import plain_modules

# Embeddings of time, text, guidance or pixels, by the name of the module at the root.
_EMBEDDING = re.compile(r"(?i)emb|time|caption|guidance|pos|pool")
# Modulation: `norm1.linear`, `time_emb_proj`, `img_mod.1`, `adaLN_modulation.1`.
_MODULATION = re.compile(r"(?i)norm|emb|ada_?ln|(^|_)mod(ulation)?s?$|scale_shift")
# An IP-Adapter: the layers in its attention processors, and the projections of image embeddings at the root.
_IP_ADAPTER = {"processor", "encoder_hid_proj", "image_proj"}
_BLOCKS = re.compile(r"(?i)block")
# `attn1`, `FluxAttention`; not the list `attentions` of transformers in a UNet, nor UNetMidBlock2DCrossAttn.
_ATTENTION = re.compile(r"(?i)^(?!.*block).*att(n|ention)\d*$")
# A vision tower inside a text encoder (Qwen2.5-VL, Gemma 3) is not used when a prompt is encoded.
_NO_TEXT = re.compile(r"(?i)vis(ual|ion)|image|audio|embed")
_NARROW = f"narrower than {NARROWEST}: a gate or a bias per head"
_OF_INPUTS = "an embedding of what this part is given: list it in target_modules to adapt it"
_BESIDE = "beside the blocks, in a part with layers of its own: list its weights in target_modules to adapt it"


def attention_targets(model: nn.Module) -> list[str]:
    """Return the attention weights of the body, in the model's order."""
    paths = dict(plain_modules(model))
    return [matrix.name for matrix in _body(model, paths) if in_attention(matrix.name, paths, _ATTENTION)]


def backbone_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights of the body, and the projections into and out of a UNet's transformers."""
    paths = dict(plain_modules(model))
    return [
        matrix.name
        for matrix in _body(model, paths)
        if not matrix.convolution or _is_pointwise(paths[matrix.name]) and not _in_resnet(matrix.name, paths)
    ]


def conv_targets(model: nn.Module) -> list[str]:
    """Return `backbone_targets` and the ungrouped convolutions of the body: the resnets and samplers of a UNet."""
    return [matrix.name for matrix in _body(model, dict(plain_modules(model)))]


def skipped_targets(model: nn.Module, preset: str) -> dict[str, str]:
    """Return the weights that a preset leaves out and why.

    They are narrow, or in parts beside the blocks: those with layers of their own, and embeddings in parts that are
    adapted.
    """
    if preset == "text":
        return {}
    paths = dict(plain_modules(model))
    roots = _roots(model)
    found = _candidates(model, paths, roots)
    narrowest = _narrowest(found)
    narrow = [matrix for matrix in found if _width(matrix) < narrowest]
    if preset == "attention":
        narrow = [matrix for matrix in narrow if in_attention(matrix.name, paths, _ATTENTION)]
    beside = {name for name, child in model.named_children() if name not in roots and _has_layers(name, child)}
    reasons = {matrix.name: _NARROW for matrix in narrow if preset == "conv" or not matrix.convolution}
    reasons |= {
        matrix.name: _BESIDE
        for matrix in matrices(model)
        if matrix.name.partition(".")[0] in beside
        and not matrix.convolution
        and not _is_modulation(matrix.name.partition(".")[2])
        and any(_is_layer(paths[path]) for path in parents(matrix.name))
    }
    parts = {name for name in roots if not _BLOCKS.search(name)}
    reasons |= {
        matrix.name: _OF_INPUTS
        for matrix in matrices(model)
        if matrix.name.partition(".")[0] in parts and not matrix.convolution and _is_embedding(matrix.name)
    }
    return reasons


def text_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights in the layers of a text encoder."""
    paths = dict(plain_modules(model))
    found = [
        matrix
        for matrix in matrices(model)
        if not matrix.convolution
        and any(isinstance(paths[path], nn.ModuleList) for path in parents(matrix.name))
        and not any(_NO_TEXT.search(part) for part in matrix.name.split("."))
    ]
    narrowest = _narrowest(found)
    if not found or not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"diffusers:text is for text encoders from transformers (CLIP, T5), got {type(model).__name__}; for "
            "denoisers, use diffusers:attention, diffusers:backbone or diffusers:conv"
        )
    return [matrix.name for matrix in found if _width(matrix) >= narrowest]


def _body(model: nn.Module, paths: Mapping[str, nn.Module]) -> list[Matrix]:
    """The matrices of the body, convolutions included, in the model's order."""
    roots = _roots(model)
    if not roots:
        raise ValueError(
            f"the diffusers presets are for the denoisers of its pipelines (UNets, transformers), but this "
            f"{type(model).__name__} has no blocks with an attention; for other models, list the target_modules"
        )
    found = _candidates(model, paths, roots)
    narrowest = _narrowest(found)
    return [matrix for matrix in found if _width(matrix) >= narrowest]


def _roots(model: nn.Module) -> set[str]:
    return {name for name, child in model.named_children() if _is_body(name, child)}


def _candidates(model: nn.Module, paths: Mapping[str, nn.Module], roots: set[str]) -> list[Matrix]:
    dead = {f"{path}.{name}" for path, module in paths.items() for name in replaced_projections(module)}
    return [
        matrix
        for matrix in matrices(model)
        if matrix.name.partition(".")[0] in roots and matrix.name not in dead and not _is_modulation(matrix.name)
    ]


def _narrowest(found: list[Matrix]) -> int:
    # Where nothing is wider, the model is a tiny configuration, whose widest weights are its projections.
    return min(NARROWEST, max(map(_width, found), default=0))


def _width(matrix: Matrix) -> int:
    return min(matrix.rows, matrix.columns)


def _is_modulation(name: str) -> bool:
    return any(_MODULATION.search(part) or part in _IP_ADAPTER for part in name.split("."))


def _is_embedding(name: str) -> bool:
    """True for a weight that is left out because of `emb` in its name alone."""
    found = [match.group() for part in name.split(".") if (match := _MODULATION.search(part))]
    return set(found) == {"emb"}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or bool(_ATTENTION.search(type(module).__name__))


def _has_layers(name: str, child: nn.Module) -> bool:
    """True for a module outside the body with an attention or blocks, or a list of layers that embeds nothing."""
    if name in _IP_ADAPTER:
        return False
    inside = [(path.rpartition(".")[2], type(module).__name__) for path, module in child.named_modules() if path]
    if any(_BLOCKS.search(path) or _ATTENTION.search(kind) for path, kind in inside):
        return True
    return not _EMBEDDING.search(name) and any(map(_is_layer, child.modules()))


def _is_body(name: str, child: nn.Module) -> bool:
    if _EMBEDDING.search(name) or name in _IP_ADAPTER:
        return False
    return bool(_BLOCKS.search(name)) or any(_ATTENTION.search(type(m).__name__) for m in child.modules())


def _is_pointwise(module: nn.Module) -> bool:
    return all(side == 1 for side in getattr(module, "kernel_size", ()))


def _in_resnet(name: str, paths: Mapping[str, nn.Module]) -> bool:
    """True for a convolution of a UNet outside its transformers: shortcuts, samplers."""
    return not any("Transformer" in type(paths[path]).__name__ for path in parents(name))
