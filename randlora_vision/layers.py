"""Adapted layers, in place: a module keeps its name, parameters and type, and its weight becomes W + delta W.

The module's class is swapped for a cached subclass of it (as `torch.nn.utils.parametrize` does). The adapted
parameter becomes a property that returns the effective weight, so code that reads `module.weight` instead of
calling the module is right; a plain linear layer's `forward` takes the memory-efficient core instead. Lambda and
gamma are registered on the module itself, beside its own parameters.

Shapes: see `randlora_vision.functional`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_vision.bases import Bases
from randlora_vision.cached import current_cache
from randlora_vision.functional import AnyTerm, effective_weight, randlora_linear
from randlora_vision.planner import ANY, PINNED, Plan
from randlora_vision.readers import peft_reader
from randlora_vision.scope import Recipe, current_scope, scope

PARTS = ("lambda", "gamma")
ATTENTION_PARAMETERS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
WEIGHT_READERS = (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS)
"""Modules whose forward reads its weight for a matrix product."""


@dataclasses.dataclass
class Slot:
    """One adapter on one parameter."""

    rank: int
    bases_count: int
    alpha: float
    dropout: float
    bases: Bases
    trainable: bool
    compute: str = "auto"
    scale: float = 1.0
    """Run-time factor, 1 unless `set_scale` says otherwise."""

    @property
    def factor(self) -> float:
        """S of the update: alpha / rank times the run-time scale."""
        return self.alpha / self.rank * self.scale


@dataclasses.dataclass
class ParameterState:
    """The adapters of one parameter; tied owners share one object."""

    out_features: int
    in_features: int
    slots: dict[str, Slot] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    transposed: bool = False
    """The module stores (I, O), as transformers' Conv1D does: the update is meant for the transpose."""
    merged: tuple[str, ...] = ()
    original: nn.Parameter | None = None
    """The base's own Parameter while `merged` is not empty: what makes unmerging bit-exact."""
    written: bool = False
    """PEFT merged adapters of its own into the merged weight, or took them out of it."""

    def pinned(self, names: list[str]) -> Plan:
        """The orders of computation that the named adapters agree on."""
        wanted = {self.slots[name].compute for name in names}
        return PINNED[wanted.pop()] if len(wanted) == 1 else ANY

    @property
    def live(self) -> list[str]:
        """Names of the adapters that act on the effective weight."""
        if not self.enabled:
            return []
        return [name for name in self.active if name not in self.merged and self.slots[name].scale != 0]


def parameter_name(param: str, part: str, adapter_name: str) -> str:
    """Name under which lambda or gamma of an adapter on `param` is registered on the module."""
    return f"{param}_randlora_{part}_{adapter_name}"


def is_adapter_name(path: str) -> bool:
    """True for the path of a lambda or gamma."""
    return "_randlora_" in path.rpartition(".")[2]


if TYPE_CHECKING:
    _Mixin = nn.Module
else:  # the adapted class inherits nn.Module from its own base
    _Mixin = object


class AdaptedModule(_Mixin):
    """What every adapted module is an instance of, besides its own type."""

    _randlora_base: type[nn.Module]
    """The class before the swap."""
    _randlora: dict[str, ParameterState]
    """Adapted parameter names and their adapters."""
    _randlora_quantized: bool

    def base_weight(self, param: str = "weight") -> Tensor:
        """The frozen parameter itself, where attribute access gives the effective weight."""
        own = self._parameters.get(param)
        if own is not None:
            return own
        computed = getattr(self._randlora_base, param, None)  # torch.nn.utils.parametrize made it a property
        if not isinstance(computed, property) or computed.fget is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {param!r}")
        return computed.fget(self)

    def adapter_tensors(self, param: str, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Lambda (R, N) and gamma (N, m) of an adapter."""
        lam, gamma = (self._parameters[parameter_name(param, part, adapter_name)] for part in PARTS)
        assert lam is not None and gamma is not None
        return lam, gamma

    def _terms(self, param: str, names: list[str], dtype: torch.dtype) -> tuple[AnyTerm, ...]:
        """The named adapters' parts of the update, with products to run in `dtype`."""
        state = self._randlora[param]
        wide = max(state.out_features, state.in_features)
        terms = []
        for name in names:
            slot = state.slots[name]
            lam, gamma = self.adapter_tensors(param, name)
            terms.append(slot.bases.term(lam, gamma, wide, slot.factor, dtype))
        return tuple(terms)

    def _effective(self, param: str) -> Tensor:
        base, state = self.base_weight(param), self._randlora[param]
        # FSDP2 reads sharded parameters by attribute: it must find its own objects.
        if not state.live or _is_sharded(base):
            return base
        low = autocast_dtype(base)
        terms = self._terms(param, state.live, low or base.dtype)
        opened = current_scope()
        if opened is None or state.transposed:
            return updated_weight(state, base, terms)
        # Inside a scope the reader is a matrix product, which autocast would round the weight for anyway.
        recipe, cache = Recipe(base, terms, low or base.dtype), current_cache()
        kept = None if cache is None else cache.weight(recipe)
        return opened.weight((id(self), param), recipe) if kept is None else kept

    def _branch(self, x: Tensor, names: list[str], dtype: torch.dtype, drop: bool) -> Tensor | None:
        """The named adapters' part of a linear layer's output (..., O), or None; `drop` applies dropout."""
        state, total = self._randlora["weight"], None
        for name in names:
            dropped = F.dropout(x, state.slots[name].dropout) if drop else x
            terms, pinned = self._terms("weight", [name], dtype), state.pinned([name])
            out = randlora_linear(dropped, None, None, terms, state.out_features, dtype, pinned)
            total = out if total is None else total + out
        return total

    def _split_dropout(self) -> tuple[list[str], list[str]]:
        """Live adapters of a linear layer without and with dropout in force."""
        state = self._randlora["weight"]
        training = self.training
        dropped = [name for name in state.live if training and state.slots[name].dropout > 0]
        return [name for name in state.live if name not in dropped], dropped

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As nn.Module's, but lambda and gamma stay float32 when the model goes to half precision."""
        masters: set[int] = set()
        for param, state in self._randlora.items():
            for name in state.slots:
                for tensor in self.adapter_tensors(param, name):
                    masters.update((id(tensor), id(tensor.grad)))
        masters.discard(id(None))

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in masters and result.dtype.itemsize < torch.float32.itemsize:
                return tensor.to(result.device)
            return result

        for state in self._randlora.values():
            if state.original is not None:
                moved = fn(state.original.detach())
                if moved.data_ptr() != state.original.data_ptr() or moved.dtype != state.original.dtype:
                    state.original = nn.Parameter(moved, requires_grad=False)
        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module's, but a checkpoint of the bare base model is complete: it has no lambda and gamma."""
        own = [
            prefix + parameter_name(param, part, name)
            for param, state in self._randlora.items()
            for name in state.slots
            for part in PARTS
        ]
        merged = sorted({name for state in self._randlora.values() for name in state.merged})
        # A state dict of other layers alone, such as a LoRA that PEFT loads, changes nothing here.
        if merged and any(key in state_dict for key in (*own, *(prefix + param for param in self._randlora))):
            error_msgs.append(f"{prefix[:-1]}: {', '.join(merged)} merged into the weight; call unmerge first")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not any(key in state_dict for key in own):
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def __delattr__(self, name: str) -> None:
        if name in self._randlora:
            raise RuntimeError(_replaced(type(self).__name__, name))
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be found by name: store the base class and the adapted parameters instead.
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__":
            raise TypeError(f"{type(self).__name__} pickles itself in its own way: merge and remove adapters first")
        arguments = (self._randlora_base, tuple(sorted(self._randlora)), self._randlora_quantized)
        return _rebuild, arguments, *reduced[2:]

    def extra_repr(self) -> str:
        """The base's, then one entry an adapter."""
        parts = [super().extra_repr()]
        for param, state in self._randlora.items():
            for name, slot in state.slots.items():
                note = " merged" if name in state.merged else "" if name in state.active else " inactive"
                parts.append(f"randlora[{param}]: {name} (rank={slot.rank}, alpha={slot.alpha:g}){note}")
        return ", ".join(part for part in parts if part)


def updated_weight(state: ParameterState, weight: Tensor, terms: tuple[AnyTerm, ...]) -> Tensor:
    """`effective_weight` of a parameter, in the orientation that its module stores."""
    return effective_weight(weight.t(), terms).t() if state.transposed else effective_weight(weight, terms)


def adapt_module(module: nn.Module, param: str, state: ParameterState) -> None:
    """Attach `state` to `param` and swap the module's class for one that knows of it."""
    _set_states(module, {**module.__dict__.get("_randlora", {}), param: state})


def restore_module(module: AdaptedModule, param: str) -> None:
    """Detach `param`; the last one gives the module its own class back."""
    _set_states(module, {name: state for name, state in module._randlora.items() if name != param})


def _set_states(module: nn.Module, states: dict[str, ParameterState]) -> None:
    if isinstance(module, AdaptedModule) and type(module) not in _CLASSES.values():
        raise RuntimeError(
            f"an adapted {type(module).__name__} was given a parametrization after inject: take it off first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
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
    # Hooks of accelerate keep the forward that they found, bound, among the module's own attributes.
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is before.forward:
            module.__dict__[name] = MethodType(swapped.forward, module)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule, str, ParameterState]]:
    """(module path, module, parameter name, state) of every adapted parameter; tied owners each once."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            for param, state in module._randlora.items():
                yield path, module, param, state


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before any swap."""
    return module._randlora_base if isinstance(module, AdaptedModule) else type(module)


def is_quantized(module: nn.Module) -> bool:
    """True for a linear layer whose weight is packed: integers, or a tensor subclass of a quantisation library."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) or _is_sharded(weight):
        return False
    return not weight.is_floating_point() or type(weight.detach()) is not Tensor


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> type[nn.Module]:
    """The one subclass of `base` whose `params` are effective weights, under the base's own name."""
    key = (base, params, quantized)
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(base, params, quantized)
    return _CLASSES[key]


def _make_class(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> type[nn.Module]:
    names = ("__module__", "__qualname__", "__doc__")
    namespace: dict[str, Any] = {name: getattr(base, name) for name in names}
    namespace.update(_randlora_base=base, _randlora_quantized=quantized)
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


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs matrix products of `tensor` in, or None where it does not."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    if not isinstance(self, AdaptedModule):  # a hook kept this method, and the adapters were removed
        return F.linear(input, self.weight, self.bias)
    weight: Tensor = self.base_weight()
    bias: Any = self.bias
    if _is_sharded(weight):
        raise RuntimeError("forward of an adapted layer met a sharded weight: FSDP must unshard its module first")
    fused, dropped = self._split_dropout()
    dtype = autocast_dtype(weight)
    if not (fused or dropped) or (dtype is None and input.dtype != weight.dtype):
        return F.linear(input, weight, bias)  # the base layer, its complaint about a wrong dtype included
    dtype = dtype or weight.dtype
    if fused:
        terms = self._terms("weight", fused, dtype)
        out = _fused_linear(input, weight, bias, terms, dtype, self._randlora["weight"].pinned(fused))
    else:
        out = F.linear(input, weight, bias)
    branch = self._branch(input, dropped, dtype, drop=True)
    return out if branch is None else out + branch


def _fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[AnyTerm, ...], dtype: torch.dtype, pinned: Plan
) -> Tensor:
    """`randlora_linear`, with the effective weight kept inside a `cached` block."""
    cache = current_cache() if pinned.forward != "factored" else None
    if cache is not None:
        kept = cache.weight(Recipe(weight, terms, dtype), x.shape[:-1].numel())
        if kept is not None:
            return F.linear(x.to(dtype), kept, None if bias is None else bias.to(dtype))
    return randlora_linear(x, weight, bias, terms, weight.shape[0], dtype, pinned)


def _quantized_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The base layer as it is, plus the adapters' branch: the packed weight is never touched."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base.forward(self, input, *args, **kwargs)
        if not isinstance(self, AdaptedModule):  # as in `_linear_forward`
            return out
        kept, dropped = self._split_dropout()
        dtype = autocast_dtype(input) or input.dtype
        for names, drop in ((kept, False), (dropped, True)):
            branch = self._branch(input, names, dtype, drop)
            if branch is not None:
                out = out + branch.to(out.dtype)
        return out

    return forward


def _scoped_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The base's forward, for modules that read their weights and hand them to a matrix product."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return base.forward(self, *args, **kwargs)
        with scope():
            return base.forward(self, *args, **kwargs)

    return forward


def _weight_property(param: str) -> property:
    def get(self: Any) -> Tensor:
        # Compiled code has none of the readers in question.
        peft = None if torch.compiler.is_compiling() else peft_reader()
        if peft is None:
            return self._effective(param)
        state = self._randlora[param]
        state.written = state.written or bool(state.merged) and peft in ("merge", "unmerge")
        return self.base_weight(param)

    def set_(self: Any, value: object) -> None:
        # nn.Module sends Parameters to its own table; only a plain tensor in a Parameter's place arrives here.
        raise RuntimeError(_replaced(type(self).__name__, param))

    return property(get, set_, doc=f"Effective {param}: the frozen one plus the active adapters' updates.")


def _refuse_delete(cls: type, name: str) -> None:
    raise RuntimeError(_replaced(cls.__name__, name))


def _replaced(type_name: str, param: str) -> str:
    return (
        f"{param!r} of an adapted {type_name} cannot be replaced or deleted (weight norm, pruning and "
        "parametrizations do that): apply them before inject, or merge and remove the adapters first"
    )


def _is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, without importing torch.distributed for it."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def _rebuild(base: type[nn.Module], params: tuple[str, ...], quantized: bool) -> nn.Module:
    """Unpickle: an empty instance of the swapped class, filled by the state that follows."""
    cls = adapted_class(base, params, quantized)
    return cls.__new__(cls)
