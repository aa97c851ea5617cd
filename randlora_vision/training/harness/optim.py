"""Optimisers, learning-rate schedules and learning rates by layer, the same for every script.

Rates that fall from the last layer to the first are those of BEiT (arXiv 2106.08254). The layers of a timm model are
those that timm.optim counts. An adapter's parameters are named after the module that they sit in, so they are of its
layer.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "constant"]
# It needs second derivatives, for which the loop's backward pass keeps no graph.
_UNFIT = {"adahessian"}
_WITH_FUSED_KERNEL = {"adam", "adamw"}  # PyTorch's own by these names


def check_optimizer_name(name: str) -> None:
    """Raise ValueError, with close matches, for a name that is none of timm's optimisers.

    Any of them may be wrapped: lookahead_adamw.
    """
    if name == "adamw":
        return  # without the import, which takes a second
    from timm.optim import list_optimizers

    known = [known for known in list_optimizers() if known not in _UNFIT]
    if name.removeprefix("lookahead_") not in known:
        close = difflib.get_close_matches(name, known, n=3)
        listing = f"close matches: {', '.join(close)}" if close else "timm.optim.list_optimizers() names them all"
        raise ValueError(f"--optimizer {name} is not known; {listing}")


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    own_lr: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.Optimizer:
    """Return timm's optimiser of that name over the trainable ones of `parameters`.

    Those in `own_lr` have a peak learning rate of their own. Raises ValueError where the optimiser
    needs a package or a device that is not there.
    """
    from timm.optim import create_optimizer_v2

    check_optimizer_name(name)
    own_lr = own_lr or {}
    everything = [parameter for parameter in parameters if parameter.requires_grad]
    common = [parameter for parameter in everything if parameter not in own_lr]
    groups = decay_groups(common, weight_decay) if common or not own_lr else []
    for rate in dict.fromkeys(own_lr.values()):
        chosen = [parameter for parameter in everything if own_lr.get(parameter) == rate]
        groups += [{**group, "lr": rate} for group in decay_groups(chosen, weight_decay)]
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, **_fused(name, everything))
    except (ImportError, AssertionError, RuntimeError, TypeError) as error:  # of packages that are not installed
        raise ValueError(f"--optimizer {name} cannot be used here: {type(error).__name__} {error}") from error


def _fused(name: str, parameters: Iterable[nn.Parameter]) -> dict[str, bool]:
    """Ask for the kernel that updates all parameters at once, where PyTorch has it for these.

    Elsewhere PyTorch and timm choose the next best (foreach) by themselves.
    """
    usable = all(p.is_cuda and p.is_floating_point() for p in parameters)
    return {"fused": True} if usable and name in _WITH_FUSED_KERNEL else {}


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return PyTorch's AdamW over the trainable ones of `parameters`."""
    return torch.optim.AdamW(decay_groups(parameters, weight_decay), lr=lr)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable ones of `parameters` as optimiser groups, decayed and not.

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
    return [group for group in groups if group["params"]]


def schedule_factor(step: int, steps: int, warmup: int, shape: Schedule = "cosine") -> float:
    """Return what the learning rate is multiplied by at `step` of `steps`, counted from 0.

    It rises linearly over the first `warmup` steps (never from zero: step 0 learns too), then falls
    along a half cosine or a line that would reach zero at `steps`, or stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * part))
    return 1 - part if shape == "linear" else 1.0


def warmup_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int, shape: Schedule = "cosine") -> LambdaLR:
    """Return the scheduler of `schedule_factor`; call its `step()` once per optimiser step."""
    return LambdaLR(optimizer, lambda step: schedule_factor(step, steps, warmup, shape))


AS_THE_ONE_BEFORE = (99999,)  # timm's word for it
Layers = Mapping[str, int]  # by a parameter's name, its layer, counted from 0


def layer_rates(model: nn.Module, parts: Iterable[Layers], lr: float, decay: float) -> dict[nn.Parameter, float]:
    """Return lr * decay ** (last layer - layer) for every trained parameter of the parts of a model."""
    parameters = dict(model.named_parameters())
    rates = {}
    for layers in parts:
        last = max(layers.values())
        for name, layer in layers.items():
            if parameters[name].requires_grad:
                rates[parameters[name]] = lr * decay ** (last - layer)
    return rates


def timm_layers(model: nn.Module) -> Layers:
    """Return the layers of a timm model, its head the last; raise ValueError for a model that does not tell them."""
    return layers_by(model, matcher(model))


def layers_by(part: nn.Module, matcher: Any, prefix: str = "") -> Layers:
    """Return the layers of a part of a model as timm's `matcher` groups them; `prefix` is the part's own name."""
    from timm.models import group_parameters

    return {f"{prefix}{name}": layer for name, layer in group_parameters(part, matcher, reverse=True).items()}


def matcher(model: Any) -> Any:
    """Return a timm model's own grouping of its parameters; raise ValueError for a model without one."""
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"--layer-decay: a {type(model).__name__} does not tell its layers, leave it out")
    return model.group_matcher(coarse=False)
