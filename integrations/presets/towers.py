"""The weights in the body of a tower: the rule shared by the timm and open_clip presets.

A tower is a vision or text encoder. Its body is every attention and MLP weight, without the modules that read pixels
and without matrices that are too narrow to be projections of tokens. If a body has more weights in convolutions than in
linear layers (ResNet, EfficientNet, MobileCLIP), its ungrouped convolutions belong to it too.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from randlora_vision.layers.peft_around import plain_modules

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MLP = re.compile(r"(?i:mlp|ffn|feed_?forward|glu)")
_POOLING = {"attnpool", "attn_pool", "attn_pool_contrastive"}
# Position bias tables and gates are linear layers too, but only a few columns wide.
NARROWEST = 16
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Matrix(NamedTuple):
    """A weight that can be a target, with convolution kernels flattened into the columns."""

    name: str
    rows: int
    columns: int
    convolution: bool = False

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.rows * self.columns


def body(tower: nn.Module, left_out: Iterable[str]) -> list[Matrix]:
    """Return the matrices of a tower's body, always with convolutions, in the tower's order.

    Args:
        tower: The encoder.
        left_out: Names of modules to skip in addition to the stem: classifiers.
    """
    excluded = stem(tower) | set(left_out)
    return [
        matrix
        for matrix in matrices(tower)
        if min(matrix.rows, matrix.columns) >= NARROWEST
        and not any(matrix.name == other or matrix.name.startswith(f"{other}.") for other in excluded)
    ]


def by_majority(matrices: list[Matrix]) -> list[Matrix]:
    """Drop the convolutions unless they hold more weights than the linear layers (without attention pooling)."""
    linear = sum(m.size for m in matrices if not m.convolution and m.name.partition(".")[0] not in _POOLING)
    convolutional = sum(m.size for m in matrices if m.convolution)
    return [m for m in matrices if convolutional > linear or not m.convolution]


def stem(tower: nn.Module) -> set[str]:
    """Return the names of the modules that read pixels.

    They are the leading convolutions at the root, and the module around the first convolution or around the layers
    that timm's configuration lists as `first_conv`: a whole module named `stem`, or else the largest module that is not
    the body itself (`patch_embed`, but only the first convolution of DenseNet's `features`). In timm's models of
    features, the layers of such a module may be modules of the root.
    """
    paths = dict(tower.named_modules())
    readers = [name for name, module in paths.items() if isinstance(module, (nn.Linear, *_CONVOLUTIONS))]
    leading = takewhile(lambda name: "." not in name and isinstance(paths[name], _CONVOLUTIONS), readers)
    first = [name for name in readers if isinstance(paths[name], _CONVOLUTIONS)][:1]
    listed = configured(tower, "first_conv")
    known = [path for name in listed for path in (name, f"model.{name}") if path in paths]
    spread = [part for name in listed if name not in paths for part in _beside(name, readers)]
    return {*leading, *spread, *(_part(name, readers) for name in (*first, *known))}


def configured(tower: nn.Module, key: str) -> set[str]:
    """Return the module names under `key` in the tower's timm configuration; empty without one."""
    names = (getattr(tower, "pretrained_cfg", None) or {}).get(key) or ()
    return {names} if isinstance(names, str) else set(names)


def in_attention(name: str, paths: Mapping[str, nn.Module], attention: re.Pattern[str]) -> bool:
    """Return True if the innermost attention or MLP around a weight is an attention.

    Args:
        name: Name of the weight.
        paths: Every module by its path.
        attention: Matches attentions of the library, by the name of the module or of its class.
    """
    for path in parents(name):
        words = (path.rpartition(".")[2], type(paths[path]).__name__)
        if any(_MLP.search(word) for word in words):
            return False
        if any(attention.search(word) for word in words):
            return True
    return False


def parents(name: str) -> Iterator[str]:
    """Yield the paths of the modules around a name, innermost first, without the root."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _beside(name: str, readers: list[str]) -> set[str]:
    """The modules of a stem that timm's models of features have at the root: `stem_0` and `stem_1` for `stem.0`."""
    parts = {reader.partition(".")[0] for reader in readers if reader.startswith(f"{name.partition('.')[0]}_")}
    return parts if 2 * sum(reader.partition(".")[0] in parts for reader in readers) <= len(readers) else set()


def _part(name: str, readers: list[str]) -> str:
    components = name.split(".")
    if "stem" in components:
        return ".".join(components[: components.index("stem") + 1])
    for depth in range(1, len(components)):
        part = ".".join(components[:depth])
        if 2 * sum(reader.startswith(f"{part}.") for reader in readers) <= len(readers):
            return part
    return name


def matrices(tower: nn.Module) -> Iterator[Matrix]:
    """Yield every weight of `tower` that can be a target, in the model's order."""
    seen: set[int] = set()
    for name, module in plain_modules(tower):
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, nn.Linear):
            # Not from the shape of the weight: quantised weights are packed.
            yield Matrix(name, module.out_features, module.in_features)
        elif isinstance(module, _CONVOLUTIONS) and module.groups == 1:
            columns = module.in_channels * math.prod(module.kernel_size)
            yield Matrix(name, module.out_channels, columns, convolution=True)
        else:
            # Any attention that keeps its projections as parameters, from torch or open_clip.
            for parameter, weight in module.named_parameters(recurse=False):
                if parameter in _ATTENTION_WEIGHTS and weight.ndim == 2:
                    yield Matrix(f"{name}.{parameter}".lstrip("."), *weight.shape)
