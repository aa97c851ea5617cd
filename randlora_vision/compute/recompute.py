"""While a module that reads its weight runs: build the effective weight once, and do not keep it for backward.

`nn.MultiheadAttention` reads its weights several times a call, and like a convolution it hands them to functions
that save them for backward: an (O, I) matrix a layer. Inside a scope a second read finds the first one's result, and
autograd stores a recipe in its place, from which the backward pass builds the same numbers again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora_vision.bases.products import Term
from randlora_vision.compute.functional import effective_weight
from randlora_vision.torch_internals import saved_tensor_hooks_are_free, storage_key, version


class Recipe(NamedTuple):
    """What an effective weight is built from: tensors that are alive anyway."""

    weight: Tensor
    terms: tuple[Term, ...]
    dtype: torch.dtype

    def build(self) -> Tensor:
        """The effective weight, differentiable where gradients are enabled."""
        return effective_weight(self.weight, self.terms, self.dtype)

    def versions(self) -> tuple[int, ...]:
        """Counters that an in-place change (an optimiser step) raises."""
        trained = (tensor for term in self.terms for tensor in (term.lam, term.gamma))
        return tuple(version(tensor) for tensor in (self.weight, *trained))


class _Kept(NamedTuple):
    """A tensor that autograd saves as it is; hooks switch off its own check of versions."""

    tensor: Tensor
    version: int


class _View(NamedTuple):
    """A saved view of an effective weight."""

    recipe: Recipe
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Scope:
    """The effective weights that one forward has read."""

    def __init__(self, hooked: bool) -> None:
        self.hooked = hooked
        self._weights: dict[Hashable, Tensor] = {}
        self._recipes: dict[int, Recipe] = {}

    def weight(self, key: Hashable, recipe: Recipe) -> Tensor:
        """The weight of this key, dtype and grad mode, built on its first read."""
        full_key = (key, recipe.dtype, torch.is_grad_enabled())
        if full_key not in self._weights:
            weight = self._weights[full_key] = recipe.build()
            if self.hooked:
                self._recipes[storage_key(weight)] = recipe
        return self._weights[full_key]

    def close(self) -> None:
        """Let go of the weights: the graph holds `pack`, and with it this object, until the backward pass."""
        self._weights.clear()
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """Autograd saves a tensor: a view of an effective weight becomes its recipe."""
        recipe = self._recipes.get(storage_key(tensor)) if tensor.layout == torch.strided else None
        if recipe is None or tensor.dtype != recipe.dtype:
            return _Kept(tensor, version(tensor))
        return _View(recipe, recipe.versions(), tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: _Kept | _View) -> Tensor:
    if isinstance(saved, _Kept):
        unchanged, rebuilt = version(saved.tensor) == saved.version, saved.tensor
    else:
        unchanged = saved.recipe.versions() == saved.versions
        with torch.no_grad():
            rebuilt = saved.recipe.build().as_strided(saved.size, saved.stride, saved.offset)
    if not unchanged:
        raise RuntimeError("a tensor needed for the backward pass was modified in place after the forward pass")
    return rebuilt


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Scope] = []


_SCOPES = _Scopes()


def current_scope() -> Scope | None:
    """The innermost scope of this thread."""
    return _SCOPES.stack[-1] if _SCOPES.stack else None


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Open a scope for the span of one module's forward."""
    # Gradient checkpointing and offloading have hooks of their own, which inner ones would hide tensors from; they keep
    # no weight either.
    opened = Scope(hooked=torch.is_grad_enabled() and saved_tensor_hooks_are_free())
    hooks: Any = contextlib.nullcontext()
    if opened.hooked:
        hooks = torch.autograd.graph.saved_tensors_hooks(opened.pack, _unpack)
    _SCOPES.stack.append(opened)
    try:
        with hooks:
            yield
    finally:
        _SCOPES.stack.pop()
        opened.close()
