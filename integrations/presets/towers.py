"""Which weights are the body of a tower: the rule that the presets of timm and open_clip share.

A tower is a vision or text encoder. Its body is every attention and MLP weight; left out are the parts that read
pixels and matrices too narrow to be a projection of tokens. Where a body holds more weights in convolutions than in
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
# Position-bias tables and gates are linear layers too, a few numbers wide.
_NARROWEST = 16
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Matrix(NamedTuple):
    """A weight that a target may be, convolution kernels flattened into the columns."""

    name: str
    rows: int
    columns: int
    convolution: bool = False

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns


def body(tower: nn.Module, left_out: Iterable[str]) -> list[Matrix]:
    """The matrices of a tower's body, convolutions always included, in the tower's order.

    Args:
        tower: The encoder.
        left_out: Names of modules to pass over besides the stem: classifiers.
    """
    excluded = stem(tower) | set(left_out)
    return [
        matrix
        for matrix in matrices(tower)
        if min(matrix.rows, matrix.columns) >= _NARROWEST
        and not any(matrix.name == other or matrix.name.startswith(f"{other}.") for other in excluded)
    ]


def by_majority(matrices: list[Matrix]) -> list[Matrix]:
    """Without the convolutions, unless they hold more weights than the linear layers (attention pooling aside)."""
    linear = sum(m.size for m in matrices if not m.convolution and m.name.partition(".")[0] not in _POOLING)
    convolutional = sum(m.size for m in matrices if m.convolution)
    return [m for m in matrices if convolutional > linear or not m.convolution]


def stem(tower: nn.Module) -> set[str]:
    """The names of the parts that read pixels.

    They are the convolutions at the root before anything else, and the part around the first convolution, or around
    the layers that timm's configuration calls `first_conv`: all of a part named `stem`, else the largest part that
    is not itself the body (`patch_embed`, but of DenseNet's `features` the first convolution alone).
    """
    paths = dict(tower.named_modules())
    readers = [name for name, module in paths.items() if isinstance(module, (nn.Linear, *_CONVOLUTIONS))]
    leading = takewhile(lambda name: "." not in name and isinstance(paths[name], _CONVOLUTIONS), readers)
    first = [name for name in readers if isinstance(paths[name], _CONVOLUTIONS)][:1]
    known = [name for name in configured(tower, "first_conv") if name in paths]
    return {*leading, *(_part(name, readers) for name in (*first, *known))}


def configured(tower: nn.Module, key: str) -> set[str]:
    """The module names that timm's configuration of the tower gives under `key`, if it has one."""
    names = (getattr(tower, "pretrained_cfg", None) or {}).get(key) or ()
    return {names} if isinstance(names, str) else set(names)


def in_attention(name: str, paths: Mapping[str, nn.Module], attention: re.Pattern[str]) -> bool:
    """True if the nearest part around a weight that is an attention or an MLP is an attention.

    Args:
        name: The weight's.
        paths: Every module by its path.
        attention: What the library calls an attention, in a part's name or its class's.
    """
    for path in parents(name):
        words = (path.rpartition(".")[2], type(paths[path]).__name__)
        if any(_MLP.search(word) for word in words):
            return False
        if any(attention.search(word) for word in words):
            return True
    return False


def parents(name: str) -> Iterator[str]:
    """The paths of the modules around a name, the nearest first, the root excepted."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


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
    """Every weight of `tower` that a target may be, in the model's order."""
    seen: set[int] = set()
    for name, module in plain_modules(tower):
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, nn.Linear):
            # Not from the weight: a quantised one is packed.
            yield Matrix(name, module.out_features, module.in_features)
        elif isinstance(module, _CONVOLUTIONS) and module.groups == 1:
            columns = module.in_channels * math.prod(module.kernel_size)
            yield Matrix(name, module.out_channels, columns, convolution=True)
        else:
            # Any attention that keeps its projections as parameters, torch's or open_clip's own.
            for parameter, weight in module.named_parameters(recurse=False):
                if parameter in _ATTENTION_WEIGHTS and weight.ndim == 2:
                    yield Matrix(f"{name}.{parameter}".lstrip("."), *weight.shape)
