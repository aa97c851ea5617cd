"""Evaluation without merging: inside a block, each layer's W + delta W is built once and reused until it changes.

This is an explicit block, and not the default, because of its cost: one more weight matrix per adapted layer, freed
when the block ends. Nothing is cached for passes that record gradients or in compiled code.

A cached matrix is used only if all its inputs are unchanged: the same tensor objects, their version counters and
addresses, the scales, the dtype, and the values of lambda and gamma, so that even an optimiser or a weight average that
writes through ``.data`` is noticed. (The values of the frozen weights are not compared: load_state_dict, merging and
every other in-place operation is noticed, but a write through ``weight.data`` is not.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_vision.bases.products import Term
from randlora_vision.compute.functional import pays_to_build
from randlora_vision.compute.recompute import Recipe
from randlora_vision.torch_internals import is_functorch_wrapped, version


class _Entry(NamedTuple):
    built: Tensor
    recipe: Recipe
    state: tuple[Any, ...]
    trained: tuple[Tensor, ...]
    """Copies of lambda and gamma."""

    def holds_for(self, recipe: Recipe) -> bool:
        own, new = _tensors(self.recipe), _tensors(recipe)
        return (
            self.state == _state(recipe)
            and all(mine is other for mine, other in zip(own, new, strict=True))
            and all(torch.equal(copy, now) for copy, now in zip(self.trained, new[1:], strict=True))
        )


class WeightCache:
    """The effective weights cached in one block, keyed by frozen weight."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._tokens: dict[int, int] = {}

    def weight(self, recipe: Recipe, tokens: int | None = None) -> Tensor | None:
        """The effective weight, cached or newly built; None if it cannot be cached or does not pay off yet.

        Args:
            recipe: What the weight is built from.
            tokens: Number of tokens of this call if the layer can also compute without the matrix, which is then
                built once the layer has seen enough tokens for building to be cheaper. None if the matrix is needed
                now.
        """
        if any(_is_special(tensor) for tensor in _tensors(recipe)):
            return None
        key = id(recipe.weight)  # the entry keeps the weight alive, so the id stays valid
        entry = self._entries.get(key)
        if entry is not None and entry.holds_for(recipe):
            return entry.built
        if entry is not None:
            del self._entries[key], self._tokens[key]
        if tokens is not None:
            self._tokens[key] = seen = self._tokens.get(key, 0) + tokens
            if not pays_to_build(seen, recipe.weight, recipe.terms):
                return None
        self._tokens.setdefault(key, 0)
        state = _state(recipe)
        trained = tuple(tensor.detach().clone() for tensor in _tensors(recipe)[1:])
        self._entries[key] = _Entry(recipe.build(), recipe, state, trained)
        return self._entries[key].built


def _tensors(recipe: Recipe) -> tuple[Tensor, ...]:
    return (recipe.weight, *(tensor for term in recipe.terms for tensor in (term.lam, term.gamma)))


def _state(recipe: Recipe) -> tuple[Any, ...]:
    tensors = _tensors(recipe)
    marks = tuple((version(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors)
    return recipe.dtype, marks, tuple(_constants(term) for term in recipe.terms)


def _constants(term: Term) -> tuple[Any, ...]:
    """The bases and scales of a term; the bases are shared and never written to."""
    where = tuple((tensor.data_ptr(), tensor.dtype) for tensor in term.frozen)
    return where, term.with_tensors((None,) * len(where), None, None)


def _is_special(tensor: Tensor) -> bool:
    """True for tensors without numbers or version counters, and inside torch.func, torch.export and fake modes."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return not plain or tensor.is_meta or tensor.is_inference() or is_functorch_wrapped(tensor)


class _Current(threading.local):
    def __init__(self) -> None:
        self.cache: WeightCache | None = None


_CURRENT = _Current()


def current_cache() -> WeightCache | None:
    """The cache of this thread, or None in passes that must not use it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _CURRENT.cache


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Cache every layer's W + delta W inside the block, so that evaluation is as fast as after `merge`.

    The cache takes one more matrix per adapted weight until the block ends. Training steps, loading, `set_scale`,
    `set_active`, averaging or moving the model inside the block is safe: what changed is built again. Passes that
    record gradients, compiled models and other threads do not use the cache.
    """
    before = _CURRENT.cache
    _CURRENT.cache = before or WeightCache()
    try:
        yield
    finally:
        _CURRENT.cache = before
