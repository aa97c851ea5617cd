"""Adapting layers in place: a module keeps its name, parameters and type, and its weight becomes W + delta W.

The module's class is swapped for a cached subclass of it (as `torch.nn.utils.parametrize` does). The adapted
parameter becomes a property that returns the effective weight, so code that reads `module.weight` instead of
calling the module gets the correct result; the `forward` of a plain linear layer uses the memory-efficient core.
Lambda and gamma are registered on the module itself, beside its own parameters.

Shapes: see `randlora_vision.compute.functional`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from randlora_vision.bases.products import Term
from randlora_vision.compute.cache import current_cache
from randlora_vision.compute.functional import randlora_linear
from randlora_vision.compute.planner import PINNED
from randlora_vision.compute.recompute import Recipe, scope
from randlora_vision.layers.adapted import (
    ATTENTION_PARAMETERS,
    CONVOLUTIONS,
    AdaptedModule,
    autocast_dtype,
    is_quantized,
)
from randlora_vision.layers.mixed import by_adapter, mixed_linear, only
from randlora_vision.layers.peft_around import watch_hosts
from randlora_vision.layers.state import ParameterState
from randlora_vision.layers.torch_around import is_sharded, is_sharder, replaced_message, wants_parameter
from randlora_vision.layers.tracing import traced_call, traced_weight
from randlora_vision.torch_internals import is_autocast_on, is_exporting

WEIGHT_READERS = (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS)
"""Modules whose forward reads the weight for a matrix product."""


def adapt_module(module: nn.Module, param: str, state: ParameterState) -> None:
    """Attach `state` to `param` and swap the module's class; call `watch_hosts` first, once for a model."""
    _set_states(module, {**module.__dict__.get("_randlora", {}), param: state})


def restore_module(module: AdaptedModule, param: str) -> None:
    """Detach `param`; detaching the last one restores the module's original class."""
    _set_states(module, {name: state for name, state in module._randlora.items() if name != param})


def _set_states(module: nn.Module, states: dict[str, ParameterState]) -> None:
    if isinstance(module, AdaptedModule) and type(module) not in _CLASSES.values():
        raise RuntimeError(
            f"the class of an adapted {type(module).__name__} was changed after inject to "
            f"{type(module).__mro__[1].__name__}: undo that first (torch.nn.utils.parametrize.remove_parametrizations "
            "for a parametrization; a model in FSDP keeps its adapters)"
        )
    base, quantized = base_class(module), is_quantized(module)
    if states:
        module.__dict__["_randlora"] = states
        swapped = adapted_class(base, tuple(sorted(states)), quantized)
    else:
        del module.__dict__["_randlora"]
        swapped = base
    before = type(module)
    module.__class__ = swapped
    # Hooks of accelerate store the original bound forward as an attribute of the module.
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is before.forward:
            module.__dict__[name] = MethodType(swapped.forward, module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before any swap."""
    return module._randlora_base if isinstance(module, AdaptedModule) else type(module)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> type[nn.Module]:
    """The one subclass of `base` whose `params` are effective weights; it has the same name as `base`."""
    key = (base, params, quantized)
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(base, params, quantized)
    return _CLASSES[key]


def _make_class(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> type[nn.Module]:
    names = ("__module__", "__qualname__", "__doc__")
    namespace: dict[str, Any] = {name: getattr(base, name) for name in names}
    namespace.update(_randlora_base=base, _randlora_quantized=quantized, __reduce_ex__=_reduce)
    forward: Callable[..., Any] | None = None
    if quantized:
        forward = _quantized_forward(base)
    else:
        namespace.update({param: _weight_property(param) for param in params})
        if base.forward is nn.Linear.forward:
            forward = _linear_forward
        elif issubclass(base, WEIGHT_READERS) or ATTENTION_PARAMETERS & set(params):
            forward = _scoped_forward(base)
    if forward is not None:
        namespace["forward"] = functools.wraps(base.forward)(forward)
    metaclass: Any = type(base)
    if any(isinstance(getattr(base, param, None), property) for param in params):
        # remove_parametrizations would delete the property from this shared class.
        metaclass = type(metaclass.__name__, (metaclass,), {"__delattr__": _refuse_delete})
    return metaclass(base.__name__, (AdaptedModule, base), namespace)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    if not isinstance(self, AdaptedModule):  # a hook kept this method, and the adapters were removed
        return F.linear(input, self.weight, self.bias)
    if isinstance(input, Proxy):
        return traced_call(self, input)
    # Attributes of a module take a call each; most layers have both as Parameters.
    weight: Any = self._parameters.get("weight")
    bias: Any = self._parameters.get("bias")
    if weight is None:
        weight = self.base_weight()
    if bias is None and "bias" not in self._parameters:
        bias = self.bias
    if (type(weight) is not nn.Parameter or weight.ndim < 2) and is_sharded(weight):
        raise RuntimeError("forward of an adapted layer got a sharded weight: FSDP must unshard its module first")
    if weight.is_meta and (not input.is_meta or self._loaded_ahead()):
        raise RuntimeError("forward of an adapted layer on the meta device got values: load the weight's values first")
    # Asked once: a pass of a small layer is bound by calls in Python.
    compiling, state = torch.compiler.is_dynamo_compiling(), self._randlora["weight"]
    dtype = autocast_dtype(weight) if compiling or is_autocast_on() else None
    if state.switches.mixture is not None and state.switches.enabled:
        mixed = mixed_linear(self, state.switches.mixture, input, weight, bias, dtype or weight.dtype)
        return F.linear(input, weight, bias) if mixed is None else mixed
    fused, dropped = state.split(self.training, compiling)
    if not (fused or dropped) or (dtype is None and input.dtype != weight.dtype):
        return F.linear(input, weight, bias)  # the base layer, including its error for a wrong dtype
    dtype = dtype or weight.dtype
    if fused:
        terms, out = self._terms("weight", fused, dtype, compiling), None
        pinned = PINNED[state.slots[fused[0]].compute] if len(fused) == 1 else state.pinned(fused)
        if not torch.is_grad_enabled() and pinned.forward != "factored":
            out = _from_cache(input, weight, bias, terms, dtype)
        if out is None:
            out = randlora_linear(input, weight, bias, terms, weight.shape[0], dtype, pinned, compiling)
    else:
        out = F.linear(input, weight, bias)
    if not dropped:
        return out
    branch = self._branch(input, dropped, dtype, True, compiling)
    return out if branch is None else out + branch


def _from_cache(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...], dtype: torch.dtype
) -> Tensor | None:
    """The output by the effective weight that a `cached` block keeps; None without one."""
    cache = current_cache()
    kept = None if cache is None else cache.weight(Recipe(weight, terms, dtype), x.shape[:-1].numel())
    return None if kept is None else F.linear(x.to(dtype), kept, None if bias is None else bias.to(dtype))


def _quantized_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The unchanged base layer plus the adapters' branch; the packed weight is never modified."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(input, Proxy):
            return traced_call(self, input, *args, **kwargs)
        out = base.forward(self, input, *args, **kwargs)
        if not isinstance(self, AdaptedModule):  # as in `_linear_forward`
            return out
        dtype, mixture = autocast_dtype(input) or input.dtype, self._randlora["weight"].mixture
        if mixture is not None:
            mixed = mixed_linear(self, mixture, input, None, None, dtype)
            return out if mixed is None else out + mixed.to(out.dtype)
        compiling = torch.compiler.is_dynamo_compiling()
        kept, dropped = self._randlora["weight"].split(self.training, compiling)
        for names, drop in ((kept, False), (dropped, True)):
            branch = self._branch(input, names, dtype, drop, compiling)
            if branch is not None:
                out = out + branch.to(out.dtype)
        return out

    return forward


def _scoped_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The base's forward, for modules that read their weights and pass them to a matrix product."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mixture = self._randlora[next(iter(self._randlora))].mixture if isinstance(self, AdaptedModule) else None
        if mixture is not None:
            return by_adapter(self, mixture, MethodType(base.forward, self), args, kwargs, only(mixture, self))
        if torch.compiler.is_compiling() or is_exporting():  # the compiler itself decides what to save
            return base.forward(self, *args, **kwargs)
        with scope():
            return base.forward(self, *args, **kwargs)

    return forward


def _weight_property(param: str) -> property:
    def get(self: Any) -> Any:
        if self._randlora_on_base:
            return self.base_weight(param)
        if torch.compiler.is_compiling():  # compiled code does not contain the readers below
            return self._effective(param)
        proxy = traced_weight(self, param, next(iter(self._randlora[param].slots)))
        if proxy is not None:
            return proxy
        return self.base_weight(param) if wants_parameter() else self._effective(param)

    def set_(self: Any, value: object) -> None:
        # nn.Module registers Parameters itself; only a plain tensor assigned in place of one gets here.
        if not is_sharder():
            raise RuntimeError(replaced_message(type(self).__name__, param))
        self.__dict__[param] = value

    return property(get, set_, doc=f"Effective {param}: the frozen one plus the active adapters' updates.")


def _refuse_delete(cls: type, name: str) -> None:
    raise RuntimeError(replaced_message(cls.__name__, name))


def _reduce(self: Any, protocol: Any) -> Any:
    # The swapped class cannot be found by name: store the base class and the adapted parameters instead.
    reduced = super(AdaptedModule, self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__":
        raise TypeError(f"{type(self).__name__} has custom pickling: merge and remove the adapters first")
    arguments = (self._randlora_base, tuple(sorted(self._randlora)), self._randlora_quantized)
    return _rebuild, arguments, *reduced[2:]


def _rebuild(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> nn.Module:
    """Unpickle: create an empty instance of the swapped class, to be filled with the pickled state."""
    watch_hosts()
    cls = adapted_class(base, params, quantized)
    return object.__new__(cls)
