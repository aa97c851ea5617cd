"""Parts of PyTorch and accelerate that read, replace or wrap the parameters of an adapted layer.

As with PEFT (`peft_around`), only the calling code tells the readers of a weight apart:

- FSDP of version 1 deletes parameters, sets plain tensors in their place and compares what it reads with its own
  objects, and the hooks of accelerate move what they read: they get the frozen parameter itself.
- Old-style weight norm, pruning and the fusion of batch norms read a weight and write back one that is computed from
  it. It would contain the update, which would then be added once more, so they are refused when they read.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import Tensor, nn

from randlora_vision.layers.readers import module_of
from randlora_vision.names import is_adapter_name

_DISTRIBUTED = "torch.distributed."
_HOLDERS = (_DISTRIBUTED, "accelerate.")
_REWRITERS = {
    "torch.nn.utils.weight_norm": "weight norm",
    "torch.nn.utils.prune": "pruning",
    "torch.nn.utils.fusion": "the fusion of a batch norm",
}
_OWN = ("torch.nn.modules.module", "randlora_vision.layers.")


def wants_parameter() -> bool:
    """True if the reader of a weight, two calls up, is FSDP or accelerate, which must get the parameter itself.

    Raises:
        RuntimeError: If the reader replaces the weight by one that is computed from it.
    """
    name = module_of(sys._getframe(2))
    if name in _REWRITERS:
        raise RuntimeError(
            f"{_REWRITERS[name]} would put the adapters' update into the weight of an adapted layer and leave the "
            "adapters there too: apply it before inject, or merge and remove the adapters first"
        )
    return name.startswith(_HOLDERS)


def is_sharder() -> bool:
    """True if FSDP is replacing an adapted parameter: the caller outside of this package and `nn.Module`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and module_of(frame).startswith(_OWN):
        frame = frame.f_back
    return frame is not None and module_of(frame).startswith(_DISTRIBUTED)


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, and for what FSDP 1 and DeepSpeed leave of a matrix: a vector, which may be empty."""
    # This does not import torch.distributed.
    dtensor = type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")
    return dtensor or (not isinstance(tensor, nn.parameter.UninitializedParameter) and tensor.ndim < 2)


def is_packed(weight: Tensor) -> bool:
    """True for the integers and the tensor subclasses of quantisation libraries."""
    if isinstance(weight, nn.parameter.UninitializedParameter) or is_sharded(weight):
        return False
    if not weight.is_floating_point():
        return True
    # A copy costs more than all else that a plan asks of a layer, so it is made for subclasses alone.
    return type(weight) not in (Tensor, nn.Parameter) and type(weight.detach()) is not Tensor


def replaced_message(type_name: str, param: str) -> str:
    """The error message for an attempt to replace or delete an adapted parameter."""
    if is_adapter_name(param):
        return f"{param!r} of an adapted {type_name} cannot be deleted: use delete_adapter or remove"
    return (
        f"{param!r} of an adapted {type_name} cannot be replaced or deleted (weight norm, pruning and "
        "parametrizations do that): apply them before inject, or merge and remove the adapters first"
    )
