"""Adapted layers in a batch whose samples have adapters of their own (`randlora_vision.per_sample`).

The adapters share their bases, so only lambda and gamma differ between samples. A linear layer stacks them and is
mapped over the samples by `torch.vmap`, which multiplies all samples by the shared matrices in one product each: the
number of operations does not depend on the number of adapters. Modules that read their weight (convolutions, packed
attention) are called once per adapter with the samples of that adapter.

Shapes: S samples, others see `randlora_vision.compute.functional`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_vision.bases import Bases
from randlora_vision.compute.functional import randlora_linear
from randlora_vision.compute.planner import ANY, Plan
from randlora_vision.layers.guarded import GuardedParameters
from randlora_vision.layers.state import Mixture, ParameterState
from randlora_vision.torch_internals import version

_APART = "run the samples of each adapter separately (randlora_vision.set_active)"


class Stack(NamedTuple):
    """Lambda and gamma of every sample, for adapters that share bases and rank."""

    bases: Bases
    lam: Tensor
    """(S, R, N), times the scale s; zero where the sample has none of these adapters."""
    gamma: Tensor
    """(S, N, m)."""


class Stacks(NamedTuple):
    """What the samples' adapters are on one parameter; compiled code reads this and no names."""

    key: tuple[Any, ...]
    """What the stacks were made from."""
    parts: tuple[Stack, ...]
    dropout: bool
    pinned: Plan


def stacks_of(module: GuardedParameters, param: str, mixture: Mixture) -> Stacks:
    """The stacks of a parameter, made again if an adapter has changed, and for every pass that records gradients.

    Compiled code uses those of the block's start: making them there would tie it to the adapters.
    """
    state = module._randlora[param]
    if torch.compiler.is_dynamo_compiling() and state.stacks is not None:
        if mixture.recorded:
            raise ValueError(
                "per_sample: a compiled model can only be evaluated: enter the block within torch.no_grad()"
            )
        return state.stacks
    used = {name: state.slots[name] for name in mixture.distinct if name in state.slots}
    tensors = {name: module.adapter_tensors(param, name) for name in used}
    both = [tensor for pair in tensors.values() for tensor in pair]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in both)
    mixture.recorded = mixture.recorded or recorded
    marks = tuple((id(tensor), version(tensor)) for tensor in both)
    key = (mixture.names, marks, tuple(slot.own_factor for slot in used.values()))
    if state.stacks is None or state.stacks.key != key or recorded:
        kinds: dict[Any, list[str | None]] = {}
        for name, slot in used.items():
            kinds.setdefault((slot.bases, slot.rank), []).append(name)
        parts = tuple(_stack(bases, own, state, tensors, mixture) for (bases, _), own in kinds.items())
        dropout = any(slot.dropout > 0 for slot in used.values())
        state.stacks = Stacks(key, parts, dropout, state.pinned(list(used)) if used else ANY)
    return state.stacks


def _stack(
    bases: Bases, own: Sequence[str | None], state: ParameterState, tensors: dict[Any, Any], mixture: Mixture
) -> Stack:
    lam, gamma = (torch.zeros_like(tensor) for tensor in tensors[own[0]])
    pairs = [tensors[name] if name in own else (lam, gamma) for name in mixture.names]
    scales = [state.slots[name].own_factor if name in own else 0.0 for name in mixture.names]  # type: ignore[index]
    factor = torch.tensor(scales, dtype=lam.dtype, device=lam.device)[:, None, None]
    return Stack(bases, torch.stack([pair[0] for pair in pairs]) * factor, torch.stack([pair[1] for pair in pairs]))


def mixed_linear(
    module: GuardedParameters,
    mixture: Mixture,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The output (..., O) of a linear layer, or its adapters' part if `weight` is None; None if no sample has any."""
    state, stacks = module._randlora["weight"], stacks_of(module, "weight", mixture)
    if not stacks.parts or state.switches.call_scale == 0:
        return None
    if module.training and stacks.dropout:
        raise ValueError(f"{_where(mixture, module)} has adapters with dropout: call model.eval() first")
    trained = [tensor for stack in stacks.parts for tensor in (stack.lam, stack.gamma)]
    check_rows(x, mixture, module)
    wide, scale = max(state.out_features, state.in_features), state.switches.call_scale

    def one(x: Tensor, *trained: Tensor) -> Tensor:
        terms = tuple(
            stack.bases.term(trained[2 * i], trained[2 * i + 1], wide, scale, dtype)
            for i, stack in enumerate(stacks.parts)
        )
        return randlora_linear(x, weight, bias, terms, state.out_features, dtype, stacks.pinned)

    within = x.shape[0] // mixture.samples
    rows = x.reshape(mixture.samples, *(() if within == 1 else (within,)), *x.shape[1:])
    return torch.vmap(one)(rows, *trained).reshape(*x.shape[:-1], state.out_features)


def check_rows(x: Tensor, mixture: Mixture, module: nn.Module, dimensions: int = 2) -> None:
    """Raise ValueError unless the rows of `x` are known to be those of one sample after another."""
    samples = mixture.samples
    first = x.shape[0] if x.ndim >= dimensions else 0
    if first == samples:
        return
    shape = f"{_where(mixture, module)} got an input of shape {tuple(x.shape)} for {samples} adapter names"
    if first == 0 or first % samples:
        raise ValueError(f"{shape}: its first dimension must be the batch, with one name for each sample")
    if x.ndim == 2 or x.shape[1] == samples:
        raise ValueError(f"{shape}, which does not tell the rows of each sample apart: {_APART}")
    if not mixture.in_model:
        raise ValueError(
            f"{shape}. A layer may get several rows per sample, such as windows, if the call of the whole model shows "
            "the batch size: call the model that was given to per_sample, or give one name for each row"
        )


def by_adapter(
    module: nn.Module,
    mixture: Mixture,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    select: Callable[[str | None], Callable[[], None]],
) -> Any:
    """Call a module once per adapter with its samples, and return the outputs in the order of the batch.

    Args:
        module: The module.
        mixture: The adapter of every sample.
        forward: The module's forward, a bound method.
        args: Positional arguments; the first argument is a batch.
        kwargs: Keyword arguments.
        select: Makes an adapter's weights those of the module, and returns what undoes that.
    """
    call = inspect.signature(forward).bind(*args, **kwargs)
    first = next(iter(call.arguments))
    x, samples, batched = call.arguments[first], mixture.samples, {first}
    check_rows(x, mixture, module, _dimensions(module))
    if isinstance(module, nn.MultiheadAttention):
        mask = call.arguments.get("attn_mask")  # with three dimensions, it has one entry per sample and head
        batched |= {
            "key",
            "value",
            "key_padding_mask",
            *(("attn_mask",) if mask is not None and mask.ndim == 3 else ()),
        }
    whole, outputs, order = dict(call.arguments), [], []

    def rows_of(tensor: Any, index: Tensor) -> Any:
        return tensor.reshape(samples, -1, *tensor.shape[1:])[index].flatten(0, 1) if tensor is not None else None

    for name in mixture.distinct:
        found = [i for i, other in enumerate(mixture.names) if other == name]
        order += found
        index = torch.tensor(found, device=x.device)
        taken: dict[int, Any] = {}  # one object for what is one object: self-attention has a faster path
        for key in batched & whole.keys():
            if id(whole[key]) not in taken:
                taken[id(whole[key])] = rows_of(whole[key], index)
            call.arguments[key] = taken[id(whole[key])]
        undo = select(name)
        try:
            outputs.append(forward(*call.args, **call.kwargs))
        finally:
            undo()
    back = torch.tensor(order, device=x.device).argsort()
    if isinstance(outputs[0], tuple):
        return tuple(None if part[0] is None else rows_of(torch.cat(part), back) for part in zip(*outputs, strict=True))
    return rows_of(torch.cat(outputs), back)


def _dimensions(module: nn.Module) -> int:
    """The least number of dimensions of a batch; some modules take a single sample too."""
    kernel = getattr(module, "kernel_size", None)
    return 3 if isinstance(module, nn.MultiheadAttention) else 2 + len(kernel) if isinstance(kernel, tuple) else 2


def only(mixture: Mixture, module: GuardedParameters) -> Callable[[str | None], Callable[[], None]]:
    """For `by_adapter`: makes one adapter the active one instead of those of the mixture."""
    switches = next(iter(module._randlora.values())).switches
    active = switches.active

    def select(name: str | None) -> Callable[[], None]:
        def undo() -> None:
            switches.mixture, switches.active = mixture, active

        switches.mixture, switches.active = None, () if name is None else (name,)
        return undo

    return select


class UnknownWeight(Tensor):
    """A weight that differs between the samples, for code that reads it: it has a shape and a dtype, but no values.

    Many hosts read the dtype of a weight.
    """

    message = "per_sample: a weight that differs between the samples cannot be read"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `torch.Tensor`'s, but only for attributes."""
        if getattr(func, "__name__", "") == "__get__" or func in (Tensor.size, Tensor.dim, Tensor.is_floating_point):
            return super().__torch_function__(func, types, args, kwargs)
        found = (value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        raise RuntimeError(next(found, cls).message)


def unknown_weight(mixture: Mixture, module: GuardedParameters, param: str, base: Tensor) -> Tensor:
    """What reading a weight gives while samples have adapters of their own; the base's if none of them is on it.

    Raises:
        RuntimeError: In compiled code, if the weight differs between the samples.
    """
    if not any(name in module._randlora[param].slots for name in mixture.distinct):
        return base
    message = (
        f"{_where(mixture, module)}: its {param} is read by other code than its own forward, and would be the same "
        f"for all samples: {_APART}"
    )
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(message)
    unknown = base.detach().as_subclass(UnknownWeight)
    unknown.message = message
    return unknown


def _where(mixture: Mixture, module: nn.Module) -> str:
    return f"per_sample: {mixture.paths.get(id(module)) or type(module).__name__!r}"
