"""The optimiser and the learning-rate schedule, the same for every method and every script."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the trainable ones of `parameters`.

    Vectors and scalars (biases, norm scales, a logit scale) are not decayed: pulling them to zero
    changes what the network computes, not how complex it is. Matrices are, lambda and gamma included.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def warmup_cosine_factor(step: int, steps: int, warmup: int) -> float:
    """Return what the learning rate is multiplied by at `step` of `steps`, counted from 0.

    It rises linearly over the first `warmup` steps (never from zero: step 0 learns too), then falls
    along a half cosine that would reach zero at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Return the scheduler of `warmup_cosine_factor`; call its `step()` once per optimiser step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, steps, warmup))
