"""A check after the first backward pass: does every adapter receive gradients?"""

from __future__ import annotations

import torch
from torch import nn

from randlora_vision.injection.record import records, unwrap
from randlora_vision.layers.adapted import adapted_modules
from randlora_vision.names import listing


def check_gradients(model: nn.Module) -> list[str]:
    """Check the gradients of every trainable active adapter; call it after the first ``loss.backward()``.

    At the start either lambda or gamma is zero, so the gradient of the other is zero by construction; the gradient of
    the zero one must not be. Layers whose paths differ only in numbers (blocks, experts) are checked together. If some
    of them receive gradients, the others are reported (an expert without tokens, a last block whose output is not
    used). If none does, their adapters cannot learn, which is an error.

    Returns:
        One note per target that has no gradient although some of its siblings have one.

    Raises:
        ValueError: If a gradient is not finite, or a target and all its siblings have none. The message names them.
    """
    model = unwrap(model)
    records(model)
    learning: dict[str, list[str]] = {}
    silent: dict[str, list[str]] = {}
    broken: list[str] = []
    for path, module, param, state in adapted_modules(model):
        for name in state.live():
            if not state.slots[name].trainable:
                continue
            pair = module.adapter_tensors(param, name)
            gradients = [tensor.grad for tensor in pair if tensor.grad is not None]
            full = f"{path}.{param}".lstrip(".")
            group = ".".join([name, *("*" if part.isdecimal() else part for part in full.split("."))])
            if any(not torch.isfinite(gradient).all() for gradient in gradients):
                broken.append(full)
            learns = len(gradients) == 2 and any(gradient.any() for gradient in gradients)
            (learning if learns else silent).setdefault(group, []).append(full)
    if broken:
        raise ValueError(
            f"gradients are not finite at {listing(dict.fromkeys(broken))}: lower the learning rate or check the data"
        )
    dead = [name for group, names in silent.items() if group not in learning for name in names]
    if dead:
        raise ValueError(
            f"no gradient reaches the adapters of {listing(dict.fromkeys(dead))}: the model does not use these weights "
            "for its loss; leave them out with exclude_modules"
        )
    return [f"no gradient at {name} in this step" for names in silent.values() for name in names]
