"""A check after the first backward pass: does every adapter receive gradients?"""

from __future__ import annotations

import torch
from torch import nn

from randlora_vision.injection.record import records, unwrap
from randlora_vision.layers.adapted import adapted_modules
from randlora_vision.layers.peft_around import plain_name
from randlora_vision.names import listing, summarise, without_numbers


def check_gradients(model: nn.Module) -> list[str]:
    """Check the gradients of every trainable active adapter; call it after the first ``loss.backward()``.

    An adapter has a gradient if the loss depends on its weight, even if the gradient is zero: behind a residual branch
    that is initialised to zero, and of the factor whose counterpart starts at zero. Layers whose paths differ only in
    numbers (blocks, experts) are checked together. If some of them have gradients, the others are reported (an expert
    without tokens, a last block whose output is not used). If none has, their adapters cannot learn, which is an error.

    Returns:
        One note per target that has no gradient although some of its siblings have one, and one note on the targets
        whose gradients are all zero, if there are any.

    Raises:
        ValueError: If a gradient is not finite, or a target and all its siblings have none. The message names them.
    """
    model = unwrap(model)
    records(model)
    reached: set[str] = set()
    silent: dict[str, list[str]] = {}
    broken: list[str] = []
    zero: list[str] = []
    for path, module, param, state in adapted_modules(model):
        for name in state.live():
            if not state.slots[name].trainable:
                continue
            held = [tensor for tensor in module.adapter_tensors(param, name) if tensor.numel()]
            if not held:  # FSDP 1 keeps both on other processes
                continue
            gradients = [tensor.grad for tensor in held if tensor.grad is not None]
            full = plain_name(f"{path}.{param}".lstrip("."))
            group = f"{name}.{without_numbers(full)}"
            if not gradients:
                silent.setdefault(group, []).append(full)
                continue
            reached.add(group)
            if any(not torch.isfinite(gradient).all() for gradient in gradients):
                broken.append(full)
            elif not any(gradient.any() for gradient in gradients):
                zero.append(full)
    if broken:
        raise ValueError(
            f"gradients are not finite at {listing(dict.fromkeys(broken))}: lower the learning rate or check the data"
        )
    dead = [name for group, names in silent.items() if group not in reached for name in names]
    if dead:
        raise ValueError(
            f"no gradient reaches the adapters of {listing(dict.fromkeys(dead))}: the model does not use these weights "
            "for its loss; leave them out with exclude_modules"
        )
    notes = [f"no gradient at {name} in this step" for names in silent.values() for name in names]
    if zero:
        names = listing(summarise(list(dict.fromkeys(zero))))
        notes.append(f"the gradient is zero in this step at {names} (a residual branch may start at zero)")
    return notes
