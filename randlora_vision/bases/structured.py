"""Structured bases: small factors instead of large matrices; B is applied as two small matrices, A class by class.

The bases of a layer depend only on its shape and rank. The SHA-256 is computed from A and B as dense matrices of the
largest sizes. Shapes and factors: see `randlora_vision.bases.hadamard`; products: `randlora_vision.bases.products`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_vision.bases import hadamard
from randlora_vision.bases.base import Bases, sizes_of
from randlora_vision.bases.products import (
    Costs,
    add_product,
    diagonal_gradients,
    multiplied,
    range_power,
    scaled_product,
)

STRUCTURED = "structured"


class StructuredBases(Bases, kinds=(STRUCTURED,)):
    """Bases that are stored as small factors, created once per shape, device and dtype."""

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> StructuredTerm:
        """As `Bases.term`."""
        q, own, right, left = self._tensors_for(lam, gamma, wide, dtype)
        return StructuredTerm(q, own, right, left, lam, gamma, scale, wide)

    def _of_term(self, lam: Tensor, gamma: Tensor, wide: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rank, bases, narrow = sizes_of(lam, gamma)
        return self._beside((rank, narrow, wide, rank * bases), lam, dtype)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """As `Bases.generate`."""
        return hadamard.dense(seed, matrix, rows, columns)

    def _made(self, key: Any, device: torch.device, dtype: torch.dtype) -> Iterable[Tensor]:
        rank, narrow, wide, columns = key
        seed = self.spec.seed
        arrays = (*hadamard.a_factors(seed, rank, narrow), *hadamard.b_factors(seed, wide, columns))
        return [torch.from_numpy(array).to(device=device, dtype=dtype) for array in arrays]

    def _is_awaited(self, matrix: int) -> bool:
        return False  # products use the factors: the matrices are written out for the checksum alone

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes of the factors of the largest shape; other shapes take about as many."""
        spec = self.spec
        b, inner, outer = hadamard.grid(spec.wide, spec.columns)
        period = hadamard.period(spec.rank)
        return dtype.itemsize * (spec.rank * period + spec.narrow + inner * b * b + outer * inner)


class StructuredTerm(NamedTuple):
    """Structured bases with their lambda and gamma; the factors are signs, exact in any dtype."""

    q: Tensor  # Q (R, P)
    own: Tensor  # s (m,), the signs of A's columns
    right: Tensor  # (ceil(K / b), b, b) with right[n, k, q] = D[n, q] * core[q, k]
    left: Tensor  # (a, ceil(K / b))
    lam: Tensor  # lambda (R, N)
    gamma: Tensor  # gamma (N, m)
    scale: float  # s = alpha / rank times the run-time scale
    wide: int  # M

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""
        return self.q, self.own, self.right, self.left

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> StructuredTerm:
        """The same term with its tensors replaced by these, or by None."""
        q, own, right, left = frozen
        return StructuredTerm(q, own, right, left, lam, gamma, self.scale, self.wide)

    def costs(self) -> Costs:
        """FLOPs of the products."""
        return _costs(self)

    def prepared(self) -> SignedTerm:
        """As `Term.prepared`: gamma with the signs of A's columns."""
        signed, scale = self.gamma * self.own.to(self.gamma.dtype), self.scale
        if self.right.dtype == torch.float16:
            power = range_power(self.gamma)
            signed, scale = signed * power, scale / power
        return SignedTerm(self.q, self.right, self.left, self.lam, signed, scale, self.wide)


class SignedTerm(NamedTuple):
    """A prepared `StructuredTerm`, with s / c as its scale.

    Every layout is such that batched products take their operands as they are: a dimension of an operand that is
    neither the batch nor contiguous would be copied first.
    """

    q: Tensor
    right: Tensor
    left: Tensor
    lam: Tensor
    gamma: Tensor
    scale: float
    wide: int

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""
        return self.q, self.right, self.left

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> SignedTerm:
        """The same term with its tensors replaced by these, or by None."""
        q, right, left = frozen
        return SignedTerm(q, right, left, lam, gamma, self.scale, self.wide)

    def prepared(self) -> SignedTerm:
        """The term itself."""
        return self

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.right.dtype

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        return _costs(self)

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""
        inner, b, _ = self.right.shape
        rows = self._unfold(wide).reshape(-1, self.left.shape[0])
        half = torch.mm(self.left.to(wide.dtype).t(), rows.t()).reshape(inner, -1, b)
        u = torch.bmm(half, self.right.to(wide.dtype).transpose(1, 2))
        return u.permute(1, 0, 2).reshape(-1, inner * b)[:, : self.lam.numel()]

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""
        inner, b, _ = self.right.shape
        outer = self.left.shape[0]
        padded = hidden if hidden.shape[1] == inner * b else _pad(hidden, inner * b)
        tokens = padded.reshape(-1, inner, b).permute(1, 0, 2)
        half = torch.bmm(tokens, self.right.to(hidden.dtype)).reshape(inner, -1).t()
        left = self.left.to(hidden.dtype).t()
        if b * outer == self.wide:
            folded = None if total is None else total.reshape(-1, outer)
            if folded is not None and folded.dtype == half.dtype:  # as `add_product` does, without the call
                return torch.addmm(folded, half, left, alpha=self.scale).reshape(-1, self.wide)
            return add_product(folded, half, left, self.scale).reshape(-1, self.wide)
        out = self._fold(add_product(None, half, left, self.scale).reshape(-1, b, outer), 1)
        return out if total is None else total + out.to(total.dtype)

    def times_af_t(self, narrow: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return ``factor`` times ``narrow`` (T, m) times Af^T: (T, K), and the same without lambda: (R, T, N)."""
        projected = self._project(narrow, factor)
        return multiplied(projected.permute(1, 0, 2), self.lam.to(narrow.dtype)).flatten(1), projected

    def times_af(self, total: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``total`` (T, m) + s u Af, and u with lambda and Q applied: (P, T, N)."""
        classes, right = self._classes(u), self._by_class(u.dtype).transpose(1, 2)
        if total is not None and total.dtype == u.dtype:
            out = torch.baddbmm(self._in_classes(total), classes, right, alpha=self.scale)
            return self._joined(out), classes
        out = self._joined(torch.bmm(classes, right) * self.scale)
        return out if total is None else total + out.to(total.dtype), classes

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""
        dtype, af = self.product_dtype, self._af()
        if not tall:
            return self.times_b_t(weight, af.t())
        inner, b, _ = self.right.shape
        outer, narrow = self.left.shape[0], self.gamma.shape[1]
        missing = inner * b - af.shape[0]
        blocks = (F.pad(af, (0, 0, 0, missing)) if missing else af).reshape(inner, b, narrow)
        half = torch.bmm(self.right.to(dtype).transpose(1, 2), blocks).permute(1, 0, 2)
        left = self.left.to(dtype).expand(b, -1, -1)
        if weight is not None and weight.dtype == dtype and b * outer == self.wide:
            out = torch.baddbmm(weight.reshape(b, outer, narrow), left, half, alpha=self.scale)
            return out.reshape(self.wide, narrow)
        delta = self._fold(torch.bmm(left, half), 0) * self.scale
        return delta if weight is None else weight + delta.to(weight.dtype)

    def gradients(
        self, u: Tensor, narrow: Tensor, classes: Tensor | None = None, projected: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Products.gradients`."""
        projected = self._project(narrow, self.scale) if projected is None else projected
        classes = self._classes(u) if classes is None else classes
        d_lam = (projected * self._by_rank(u)).sum(1, dtype=self.lam.dtype)
        d_gamma = scaled_product(classes.transpose(1, 2), self._in_classes(narrow), self.scale)
        return d_lam, self._joined(d_gamma).to(self.gamma.dtype)

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""
        inner, b, _ = self.right.shape
        narrow = self.gamma.shape[1]
        left, right = self.left.to(d_weight.dtype), self.right.to(d_weight.dtype)
        folded = self._unfold(d_weight.t()).permute(1, 2, 0)  # (q, p, m)
        half = torch.bmm(left.t().expand(b, -1, -1), folded).permute(1, 0, 2)
        d_af = scaled_product(right, half, self.scale).reshape(inner * b, narrow)[: self.lam.numel()]
        spread = self.q.repeat_interleave(self._class_size(), dim=1)[:, :narrow].to(self.lam.dtype)
        return diagonal_gradients(spread, self.lam, self.gamma, d_af)

    def _fold(self, rows: Tensor, dim: int) -> Tensor:
        """Join the dimensions (q, p) at `dim` into one dimension of M rows."""
        b, outer = self.right.shape[1], self.left.shape[0]
        full = hadamard.full_rows(self.wide, b, outer)
        if full == b:
            return rows.flatten(dim, dim + 1)
        short = rows.narrow(dim, full, b - full).narrow(dim + 1, 0, outer - 1)
        return torch.cat([rows.narrow(dim, 0, full).flatten(dim, dim + 1), short.flatten(dim, dim + 1)], dim)

    def _unfold(self, wide: Tensor) -> Tensor:
        """Reshape (T, M) to (T, q, p), with zeros for the missing rows."""
        b, outer = self.right.shape[1], self.left.shape[0]
        tokens = wide.shape[0]
        if self.wide == b * outer:
            return wide.reshape(tokens, b, outer)
        full = hadamard.full_rows(self.wide, b, outer)
        short = wide[:, full * outer :].reshape(tokens, b - full, outer - 1)
        return torch.cat([wide[:, : full * outer].reshape(tokens, full, outer), F.pad(short, (0, 1))], 1)

    def _af(self) -> Tensor:
        """Af (K, m), in the dtype of the products."""
        rank, classes = self.q.shape
        bases, narrow = self.gamma.shape
        size = self._class_size()
        gamma = _pad(self.gamma, classes * size).reshape(bases, classes, size)
        signs = self.lam[:, :, None] * self.q[:, None, :].to(self.lam.dtype)
        whole = (signs[:, :, :, None] * gamma).reshape(rank * bases, classes * size)
        return whole[:, :narrow].to(self.product_dtype)

    def _class_size(self) -> int:
        return -(-self.gamma.shape[1] // self.q.shape[1])

    def _by_class(self, dtype: torch.dtype) -> Tensor:
        """Gamma in `dtype` as (P, C, N)."""
        (bases, narrow), classes = self.gamma.shape, self.q.shape[1]
        size = -(-narrow // classes)
        padded = self.gamma if narrow == classes * size else _pad(self.gamma, classes * size)
        return padded.to(dtype).reshape(bases, classes, size).permute(1, 2, 0)

    def _in_classes(self, narrow: Tensor) -> Tensor:
        """Reshape (T, m) to (P, T, C)."""
        classes = self.q.shape[1]
        size = -(-narrow.shape[1] // classes)
        padded = narrow if narrow.shape[1] == classes * size else _pad(narrow, classes * size)
        return padded.reshape(-1, classes, size).permute(1, 0, 2)

    def _joined(self, classes: Tensor) -> Tensor:
        """Reshape (P, T, C) to (T, m)."""
        return classes.permute(1, 0, 2).flatten(1)[:, : self.gamma.shape[1]]

    def _project(self, narrow: Tensor, factor: float) -> Tensor:
        """Apply Af without lambda to (T, m): (R, T, N)."""
        mixed = scaled_product(self._in_classes(narrow), self._by_class(narrow.dtype), factor)
        rank, classes = self.q.shape
        return torch.mm(self.q.to(narrow.dtype), mixed.reshape(classes, -1)).reshape(rank, -1, self.gamma.shape[0])

    def _by_rank(self, u: Tensor) -> Tensor:
        """Reshape (T, K) to (R, T, N)."""
        return u.reshape(-1, *self.lam.shape).permute(1, 0, 2)

    def _classes(self, u: Tensor) -> Tensor:
        """Apply lambda and Q^T to (T, K): (P, T, N)."""
        rank, classes = self.q.shape
        weighted = multiplied(self._by_rank(u), self.lam.to(u.dtype)[:, None, :]).reshape(rank, -1)
        return torch.mm(self.q.to(u.dtype).t(), weighted).reshape(classes, -1, self.gamma.shape[0])


def _pad(tensor: Tensor, columns: int) -> Tensor:
    """Pad with zeros to `columns` columns."""
    missing = columns - tensor.shape[1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _costs(term: StructuredTerm | SignedTerm) -> Costs:
    grid = (term.right.shape[1], term.right.shape[0], term.left.shape[0])
    return structured_costs(term.gamma.shape[1], term.lam.shape[0], term.lam.shape[1], term.q.shape[1], grid)


def structured_costs(narrow: int, rank: int, bases: int, period: int, grid: tuple[int, int, int]) -> Costs:
    """FLOPs of the products with structured bases; `grid` is the result of `hadamard.grid`."""
    b, inner, outer = grid
    times_b = 2 * b * inner * (b + outer)
    times_af_t = 2 * bases * (period * -(-narrow // period) + period * rank)
    build = narrow * times_b
    shared = 2 * bases * period * rank
    weight_gradient = build + 4 * narrow * rank * bases
    return Costs(build, times_b, times_af_t, 2 * times_af_t, shared, times_af_t, 0, weight_gradient)
