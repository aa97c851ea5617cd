"""open_clip: which weights of a CLIP-like model RandLoRA adapts.

    inject(model, RandLoRAConfig(rank=32, target_modules="open_clip:vision"))

The presets `vision`, `text` and `both` follow one rule, whatever the model is called: every
attention and MLP weight of the tower's body and of its attention pooling. Left out are the patch
embedding or stem, the classifier and the projection into the shared space, and matrices too narrow
to be a projection of tokens. In a tower whose body holds more weights in convolutions than in linear
layers (ResNet, MobileCLIP), its ungrouped convolutions are adapted too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLING = {"attnpool", "attn_pool", "attn_pool_contrastive"}
# Position-bias tables and gates are linear layers too, a few numbers wide.
_NARROWEST = 16
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def vision_targets(model: nn.Module) -> list[str]:
    """Return the target names of the vision tower, in the model's order."""
    _require_open_clip(model)
    visual = model.get_submodule("visual")
    path = "visual.trunk" if isinstance(getattr(visual, "trunk", None), nn.Module) else "visual"
    return _tower_targets(model, path)


def text_targets(model: nn.Module) -> list[str]:
    """Return the target names of the text tower, in the model's order (of CoCa: not its decoder's)."""
    _require_open_clip(model)
    return _tower_targets(model, _text_path(model))


def both_targets(model: nn.Module) -> list[str]:
    """Return the target names of the vision tower, then those of the text tower."""
    return vision_targets(model) + text_targets(model)


PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "vision": vision_targets,
    "text": text_targets,
    "both": both_targets,
}


def _text_path(model: nn.Module) -> str:
    # The classic CLIP class keeps the text tower's parts at its own root, all others in `text`.
    return "text.transformer" if isinstance(getattr(model, "text", None), nn.Module) else "transformer"


def _require_open_clip(model: nn.Module) -> None:
    """Raise ValueError unless the model has an open_clip model's two towers."""
    encoders = all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text"))
    modules = dict(model.named_modules())
    if not (encoders and "visual" in modules and _text_path(model) in modules):
        raise ValueError(
            "the open_clip presets need a model of open_clip (with encode_image, encode_text, `visual` and "
            f"`{_text_path(model)}`), got {type(model).__name__}; for other models name the target_modules"
        )


def _tower_targets(model: nn.Module, path: str) -> list[str]:
    tower = model.get_submodule(path)
    left_out = _stem(tower) | _configured(tower, "classifier")
    matrices = [
        matrix
        for matrix in _matrices(tower)
        if min(matrix.rows, matrix.columns) >= _NARROWEST
        and not any(matrix.name == other or matrix.name.startswith(f"{other}.") for other in left_out)
    ]
    linear = sum(m.size for m in matrices if not m.convolution and m.name.partition(".")[0] not in _POOLING)
    convolutional = sum(m.size for m in matrices if m.convolution)
    return [f"{path}.{m.name}" for m in matrices if convolutional > linear or not m.convolution]


class _Matrix(NamedTuple):
    name: str  # of the target, relative to the tower
    rows: int
    columns: int
    convolution: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.columns


def _matrices(tower: nn.Module) -> Iterator[_Matrix]:
    """Yield every weight of `tower` that a target may be, in the model's order."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear):
            # Not from the weight: a quantised one is packed.
            yield _Matrix(name, module.out_features, module.in_features)
        elif isinstance(module, _Convolution) and module.groups == 1:
            columns = module.in_channels * math.prod(module.kernel_size)
            yield _Matrix(name, module.out_channels, columns, convolution=True)
        else:
            # Any attention that keeps its projections as parameters, torch's or open_clip's own.
            for parameter, weight in module.named_parameters(recurse=False):
                if parameter in _ATTENTION_WEIGHTS and weight.ndim == 2:
                    yield _Matrix(f"{name}.{parameter}", *weight.shape)


def _stem(tower: nn.Module) -> set[str]:
    """Return the names of the parts that read pixels: any convolution at the root, the first part with one."""
    convolutions = [name for name, module in tower.named_modules() if isinstance(module, _Convolution)]
    first = {name.partition(".")[0] for name in convolutions[:1]}
    at_root = {name for name in convolutions if "." not in name}
    return first | at_root | {name.partition(".")[0] for name in _configured(tower, "first_conv")}


def _configured(tower: nn.Module, key: str) -> set[str]:
    """Return the module names that timm's configuration of the tower gives under `key`, if it is timm's."""
    names = (getattr(tower, "pretrained_cfg", None) or {}).get(key) or ()
    return {names} if isinstance(names, str) else set(names)
