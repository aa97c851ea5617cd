"""For modules that read their weight: build the effective weight once per forward, and do not save it for backward.

`nn.MultiheadAttention` reads its weights several times per call and, like a convolution, passes them to functions
that save them for backward: one (O, I) matrix per layer. Inside a scope, a second read returns the result of the
first, and autograd stores a recipe instead, from which the backward pass rebuilds the same values.
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
    """What an effective weight is built from: tensors that are in memory anyway."""

    weight: Tensor
    terms: tuple[Term, ...]
    dtype: torch.dtype

    def build(self) -> Tensor:
        """The effective weight, differentiable if gradients are enabled."""
        return effective_weight(self.weight, self.terms, self.dtype)

    def versions(self) -> tuple[int, ...]:
        """Version counters, which an in-place change (such as an optimiser step) increments."""
        trained = (tensor for term in self.terms for tensor in (term.lam, term.gamma))
        return tuple(version(tensor) for tensor in (self.weight, *trained))


class _Kept(NamedTuple):
    """A tensor that autograd saves unchanged; its version is checked here because hooks disable autograd's check."""

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
    """The effective weights that have been read during one forward pass."""

    def __init__(self, hooked: bool) -> None:
        self.hooked = hooked
        self._weights: dict[Hashable, Tensor] = {}
        self._recipes: dict[int, Recipe] = {}

    def weight(self, key: Hashable, recipe: Recipe) -> Tensor:
        """The weight for this key, dtype and grad mode, built on the first read."""
        full_key = (key, recipe.dtype, torch.is_grad_enabled())
        if full_key not in self._weights:
            weight = self._weights[full_key] = recipe.build()
            if self.hooked:
                self._recipes[storage_key(weight)] = recipe
        return self._weights[full_key]

    def close(self) -> None:
        """Release the weights: the graph references `pack`, and hence this object, until the backward pass."""
        self._weights.clear()
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """Pack a tensor that autograd saves, replacing a view of an effective weight by its recipe."""
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
    """Open a scope for the duration of one module's forward."""
    # Gradient checkpointing and offloading use hooks too, and inner hooks would hide tensors from them; they do not
    # keep weights either.
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
