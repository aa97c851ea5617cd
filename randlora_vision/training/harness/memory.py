"""What trades memory for time: checkpointed activations and the order of numbers in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's, transformers'


def placed(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a timm or open_clip model to a device, in place, with convolutions in channels-last order if asked for.

    The pictures that it is given are put in that order too: the weight that an adapter makes has the usual one, and
    a convolution keeps to the channels-last order when either of the two has it.
    """
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        getattr(model, "visual", model).register_forward_pre_hook(_reorder)
    return model


def _reorder(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    pictures, *rest = inputs
    return pictures.contiguous(memory_format=torch.channels_last), *rest


def checkpoint_activations(model: Any, what: str, within: Callable[[str], bool] = lambda name: True) -> None:
    """Let the blocks of a timm or open_clip model compute their activations again in the backward pass.

    `within` tells by a module's name whether it is of the part that `what` names. Raises ValueError where
    no block of that part can do it: some models take the call and ignore it.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(f"--gradient-checkpointing: {_without(what, model)}") from error
    if not any(getattr(part, flag, False) for name, part in _named(model) if within(name) for flag in _FLAGS):
        raise ValueError(f"--gradient-checkpointing: {_without(what, model)}")


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.", part) for name, part in model.named_modules()]


def _without(what: str, model: nn.Module) -> str:
    return f"{what} of this {type(model).__name__} has no blocks that can be computed again, leave it out"
