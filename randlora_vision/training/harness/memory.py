"""Trading memory for time: activation checkpointing and the channels-last memory format."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's, transformers'


def on_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a timm or open_clip model to a device, in place, optionally in channels-last format.

    The input pictures are converted to that format too: the weight that an adapter computes has the default format,
    and a convolution runs in channels-last format when either its weight or its input has it.
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
    """Recompute activations of blocks in the backward pass; raise ValueError if no block `within` the part can."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(f"--gradient-checkpointing: {_without(what, model)}") from error
    if not any(getattr(part, flag, False) for name, part in _named(model) if within(name) for flag in _FLAGS):
        raise ValueError(f"--gradient-checkpointing: {_without(what, model)}")


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.", part) for name, part in model.named_modules()]


def _without(what: str, model: nn.Module) -> str:
    return f"{what} of this {type(model).__name__} has no blocks that can be recomputed, leave it out"
