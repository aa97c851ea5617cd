"""Optimisers and layer-wise learning rates, the same for every script.

Learning rates that decay from the last layer to the first follow BEiT (arXiv 2106.08254). The layers of a timm model
are those of timm.optim. An adapter's parameters carry the name of their module, so they belong to the module's layer.

The groups are by hand, because those of timm
are for a whole model, not for the parameters that an adapter trains.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from randlora_vision.names import close_matches

PRODIGY = "prodigy"
# It needs second derivatives, but the loop's backward pass does not keep the graph.
_UNFIT = {"adahessian"}
_WITH_FUSED_KERNEL = {"adam", "adamw"}  # PyTorch's optimisers of these names


class Rate(float):
    """A peak learning rate and the name under which it is logged, for example head (as lr_head)."""

    name: str

    def __new__(cls, value: float, name: str) -> "Rate":
        """Return a number that is equal to `value`."""
        rate = super().__new__(cls, value)
        rate.name = name
        return rate


def check_optimizer_name(name: str) -> None:
    """Raise ValueError, with close matches, for a name that is not one of timm's optimisers, or Prodigy.

    Any of timm's may be wrapped, as in lookahead_adamw.
    """
    if name in ("adamw", PRODIGY):
        return  # without the import, which takes a second
    from timm.optim import list_optimizers

    known = [known for known in list_optimizers() if known not in _UNFIT]
    if name.removeprefix("lookahead_") not in known:
        hint = close_matches(name, known) or "timm.optim.list_optimizers() names them all"
        raise ValueError(f"--optimizer {name} is not known; {hint}")


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    own_lr: Mapping[nn.Parameter, float] | None = None,
    betas: tuple[float | None, float | None] = (None, None),
    eps: float | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimiser of that name over the trainable parameters in `parameters`.

    `own_lr` gives individual peak learning rates; the groups of a `Rate` have its name as "name". `betas` and `eps`
    replace those of the optimiser, and `arguments` its other ones. Raises ValueError when the optimiser needs a package
    or a device that is not available, or does not have two betas or such an argument, or has one rate while `own_lr`
    has others.
    """
    check_optimizer_name(name)
    own_lr = own_lr or {}
    everything = [parameter for parameter in parameters if parameter.requires_grad]
    common = [parameter for parameter in everything if parameter not in own_lr]
    groups = decay_groups(common, weight_decay) if common or not own_lr else []
    named: dict[tuple[float, str | None], list[nn.Parameter]] = {}
    for parameter in everything:
        if (rate := own_lr.get(parameter)) is not None:
            named.setdefault((float(rate), getattr(rate, "name", None)), []).append(parameter)
    for (rate, label), chosen in named.items():
        own = {"lr": rate, "name": label} if label else {"lr": rate}
        groups += [{**group, **own} for group in decay_groups(chosen, weight_decay)]
    if name == PRODIGY:
        return _prodigy(groups, lr, betas, eps, arguments or {})
    from timm.optim import create_optimizer_v2, get_optimizer_info

    try:
        numbers = {**_fused(name, everything), **_numbers(name, betas, eps), **(arguments or {})}
        if name.startswith("bnb"):  # for which timm's factory asks for a GPU, unlike bitsandbytes itself
            defaults = get_optimizer_info(name).defaults or {}
            optimizer: torch.optim.Optimizer = _class_of(name)(groups, lr=lr, **{**defaults, **numbers})
            return optimizer
        return create_optimizer_v2(groups, opt=name, lr=lr, **numbers)
    except (ImportError, AssertionError, RuntimeError, TypeError) as error:  # from packages that are not installed
        raise ValueError(f"--optimizer {name} cannot be used here: {type(error).__name__} {error}") from error


def _prodigy(
    groups: list[dict[str, Any]],
    lr: float,
    betas: tuple[float | None, float | None],
    eps: float | None,
    arguments: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Return Prodigy, where nothing else is given with the settings of diffusers' scripts."""
    others = sorted({group["lr"] for group in groups if group.get("lr", lr) != lr})
    if others:
        raise ValueError(
            f"--optimizer prodigy has one rate for all parameters, --lr {lr:g}, but some have {others[0]:g}"
        )
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ValueError(f"--optimizer prodigy needs its package: pip install prodigyopt ({error})") from error
    usual = (0.9, 0.999)
    both = tuple(given if given is not None else own for given, own in zip(betas, usual, strict=True))
    numbers = {} if eps is None else {"eps": eps}
    settings = {"use_bias_correction": True, "safeguard_warmup": True, **numbers, **arguments}
    try:
        optimizer: torch.optim.Optimizer = Prodigy(groups, lr=lr, betas=both, **settings)
    except TypeError as error:  # an argument that it does not have
        raise ValueError(f"--optimizer prodigy: {error}") from error
    return optimizer


def _numbers(name: str, betas: tuple[float | None, float | None], eps: float | None) -> dict[str, Any]:
    """Return the betas, those not given from the optimiser's own defaults, and epsilon, as keywords."""
    numbers: dict[str, Any] = {} if eps is None else {"eps": eps}
    if betas != (None, None):
        defaults = inspect.signature(_class_of(name.removeprefix("lookahead_")))
        own = defaults.parameters.get("betas")
        if own is None or len(own.default) != 2:
            raise ValueError(f"--optimizer {name} does not have two betas: leave --beta1 and --beta2 out")
        numbers["betas"] = tuple(
            usual if beta is None else beta for beta, usual in zip(betas, own.default, strict=True)
        )
    return numbers


def _class_of(name: str) -> Any:
    """Return the class of one of timm's optimisers, without the GPU that timm asks for with those of bitsandbytes."""
    from timm.optim import get_optimizer_class, get_optimizer_info

    if not name.startswith("bnb"):
        return get_optimizer_class(name, bind_defaults=False)
    module, _, kind = str(get_optimizer_info(name).opt_class).rpartition(".")
    if name.endswith("8bit") and not kind.endswith("8bit"):  # older timm names AdamW, of 32 bits
        kind += "8bit"
    return getattr(importlib.import_module(module), kind)


def _fused(name: str, parameters: Iterable[nn.Parameter]) -> dict[str, bool]:
    """Request the fused kernel, which updates all parameters at once, where PyTorch supports it.

    Elsewhere PyTorch and timm choose the next best implementation (foreach) themselves.
    """
    usable = all(p.is_cuda and p.is_floating_point() for p in parameters)
    return {"fused": True} if usable and name in _WITH_FUSED_KERNEL else {}


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in `parameters` as optimiser groups, with and without weight decay.

    Vectors and scalars (biases, norm scales, a logit scale) are not decayed: pulling them to zero
    changes what the network computes, not how complex it is. Matrices, including lambda and gamma, are.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def current_rates(optimizer: torch.optim.Optimizer, lr: float) -> dict[str, float]:
    """Return the common learning rate as "lr", and those of groups with a name as "lr_<name>".

    If every group has a name, the common rate is `lr`.
    """
    common = [float(group["lr"]) for group in optimizer.param_groups if "name" not in group]
    own = {f"lr_{group['name']}": float(group["lr"]) for group in optimizer.param_groups if "name" in group}
    return {"lr": common[0] if common else lr, **own}


AS_THE_ONE_BEFORE = (99999,)  # timm's marker for this
Layers = Mapping[str, int]  # parameter name -> layer, counted from 0


def layer_rates(model: nn.Module, parts: Iterable[Layers], lr: float, decay: float) -> dict[nn.Parameter, float]:
    """Return lr * decay ** (last layer - layer) for every trained parameter of the parts of a model.

    The rates are named by the layer counted from the end, from "layer_-2"; that of the last layers is `lr` itself.
    """
    parameters = dict(model.named_parameters())
    rates = {}
    for layers in parts:
        last = max(layers.values())
        for name, layer in layers.items():
            before = last - layer
            if parameters[name].requires_grad:
                rates[parameters[name]] = Rate(lr * decay**before, f"layer_{-1 - before}") if before else lr
    return rates


def timm_layers(model: nn.Module) -> Layers:
    """Return the layers of a timm model, the head last; raise ValueError if the model does not define them."""
    return layers_by(model, matcher(model))


def layers_by(part: nn.Module, matcher: Any, prefix: str = "") -> Layers:
    """Return the layers of part of a model as grouped by timm's `matcher`; `prefix` is the name of the part."""
    from timm.models import group_parameters

    return {f"{prefix}{name}": layer for name, layer in group_parameters(part, matcher, reverse=True).items()}


def matcher(model: Any) -> Any:
    """Return a timm model's grouping of its parameters; raise ValueError if it has none."""
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"--layer-decay: {type(model).__name__} does not define its layers, leave it out")
    return model.group_matcher(coarse=False)
