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
from randlora_vision.bases.products import Costs, add_product, diagonal_gradients, range_power, scaled_a

STRUCTURED = "structured"


class StructuredBases(Bases, kinds=(STRUCTURED,)):
    """Bases that are stored as small factors, created once per shape, device and dtype."""

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> StructuredTerm:
        """As `Bases.term`."""
        rank, bases, narrow = sizes_of(lam, gamma)
        q, own, right, left = self._beside((rank, narrow, wide, rank * bases), lam, dtype)
        return StructuredTerm(q, own, right, left, lam, gamma, scale, wide)

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
    """Structured bases with their lambda and gamma; the factors are signs, exact in any dtype.

    Attributes:
        q: Q (R, P).
        own: s (m,), the signs of A's columns.
        right: (ceil(K / b), b, b) with right[n, k, q] = D[n, q] * core[q, k].
        left: (a, ceil(K / b)).
        lam: lambda (R, N).
        gamma: gamma (N, m).
        scale: s = alpha / rank times the run-time scale.
        wide: M.
    """

    q: Tensor
    own: Tensor
    right: Tensor
    left: Tensor
    lam: Tensor
    gamma: Tensor
    scale: float
    wide: int

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""
        return self.q, self.own, self.right, self.left

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> StructuredTerm:
        """The same term with its tensors replaced by these, or by None."""
        q, own, right, left = frozen
        return StructuredTerm(q, own, right, left, lam, gamma, self.scale, self.wide)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.right.dtype

    @property
    def product_scale(self) -> float:
        """The factor s / c of products with values from `times_af_t`."""
        return self.scale / range_power(self.gamma)

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        grid = (self.right.shape[1], self.right.shape[0], self.left.shape[0])
        return structured_costs(self.gamma.shape[1], self.lam.shape[0], self.lam.shape[1], self.q.shape[1], grid)

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""
        inner, b, _ = self.right.shape
        outer, columns = self.left.shape[0], self.lam.numel()
        tokens = self._unfold(wide).reshape(-1, outer)
        half = torch.mm(tokens, self.left.to(wide.dtype)).reshape(-1, b, inner).permute(2, 0, 1)
        u = torch.bmm(half, self.right.to(wide.dtype).transpose(1, 2))
        return u.permute(1, 0, 2).reshape(-1, inner * b)[:, :columns]

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""
        inner, b, _ = self.right.shape
        outer, factor = self.left.shape[0], self.product_scale
        tokens = _pad(hidden, inner * b).reshape(-1, inner, b).permute(1, 0, 2)
        half = torch.bmm(tokens, self.right.to(hidden.dtype)).permute(1, 2, 0).reshape(-1, inner)
        left = self.left.to(hidden.dtype).t()
        if b * outer == self.wide:
            folded = None if total is None else total.reshape(-1, outer)
            return add_product(folded, half, left, factor).reshape(-1, self.wide)
        out = self._fold(add_product(None, half, left, factor).reshape(-1, b, outer), 1)
        return out if total is None else total + out.to(total.dtype)

    def times_af_t(self, narrow: Tensor) -> Tensor:
        """Return ``narrow`` (T, m) times Af^T: (T, K), scaled by c."""
        hidden = self._project(narrow) * self.lam.to(narrow.dtype)[:, None, :]
        return hidden.permute(1, 0, 2).flatten(1)

    def times_af(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Return ``total`` (T, m) + s u Af."""
        left, right = self._classes(self._by_rank(u)), self._gamma(u.dtype).transpose(1, 2)
        factor = self.product_scale
        if total is not None and total.dtype == u.dtype:
            out = torch.baddbmm(self._in_classes(total), left, right, alpha=factor)
            return self._joined(out)
        out = self._joined(torch.bmm(left, right) * factor)
        return out if total is None else total + out.to(total.dtype)

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""
        dtype = self.product_dtype
        af = scaled_a(self._a(), self.lam, self.gamma, dtype)
        if not tall:
            return self.times_b_t(weight, af.t())
        inner, b, _ = self.right.shape
        outer, narrow = self.left.shape[0], self.gamma.shape[1]
        blocks = F.pad(af, (0, 0, 0, inner * b - af.shape[0])).view(inner, b, narrow)
        half = torch.bmm(self.right.to(dtype).transpose(1, 2), blocks).permute(1, 0, 2)
        left = self.left.to(dtype).expand(b, -1, -1)
        factor = self.product_scale
        if weight is not None and weight.dtype == dtype and b * outer == self.wide:
            return torch.baddbmm(weight.reshape(b, outer, narrow), left, half, alpha=factor).view(self.wide, narrow)
        delta = self._fold(torch.bmm(left, half), 0) * factor
        return delta if weight is None else weight + delta.to(weight.dtype)

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""
        by_rank = self._by_rank(u)
        d_lam = (self._project(narrow) * by_rank).sum(1, dtype=self.lam.dtype) * self.product_scale
        d_classes = torch.bmm(self._classes(by_rank).transpose(1, 2), self._in_classes(narrow))
        return d_lam, self._joined(d_classes).to(self.gamma.dtype) * (self._own() * self.scale)

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""
        d_af = self.times_b(d_weight.t()).t()
        return diagonal_gradients(self._a(), self.lam, self.gamma, self.scale, d_af)

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
        full, tokens = hadamard.full_rows(self.wide, b, outer), wide.shape[0]
        if full == b:
            return wide.reshape(tokens, b, outer)
        short = wide[:, full * outer :].reshape(tokens, b - full, outer - 1)
        return torch.cat([wide[:, : full * outer].reshape(tokens, full, outer), F.pad(short, (0, 1))], 1)

    def _a(self) -> Tensor:
        """The matrix A (R, m), in the dtype of lambda."""
        narrow = self.gamma.shape[1]
        spread = self.q.repeat_interleave(self._class_size(), dim=1)[:, :narrow]
        return (spread * self.own).to(self.lam.dtype)

    def _own(self) -> Tensor:
        return self.own.to(self.gamma.dtype)

    def _class_size(self) -> int:
        return -(-self.gamma.shape[1] // self.q.shape[1])

    def _gamma(self, dtype: torch.dtype) -> Tensor:
        """Gamma with the signs of A's columns, scaled by c: (P, C, N)."""
        classes, size, bases = self.q.shape[1], self._class_size(), self.gamma.shape[0]
        signed = self.gamma * (self._own() * range_power(self.gamma))
        return _pad(signed, classes * size).view(bases, classes, size).permute(1, 2, 0).to(dtype)

    def _in_classes(self, narrow: Tensor) -> Tensor:
        """Reshape (T, m) to (P, T, C)."""
        classes, size = self.q.shape[1], self._class_size()
        return _pad(narrow, classes * size).reshape(-1, classes, size).permute(1, 0, 2)

    def _joined(self, classes: Tensor) -> Tensor:
        """Reshape (P, T, C) to (T, m)."""
        return classes.permute(1, 0, 2).flatten(1)[:, : self.gamma.shape[1]]

    def _project(self, narrow: Tensor) -> Tensor:
        """Apply Af without lambda to (T, m): (R, T, N), scaled by c."""
        mixed = torch.bmm(self._in_classes(narrow), self._gamma(narrow.dtype))
        rank, classes = self.q.shape
        return torch.mm(self.q.to(narrow.dtype), mixed.reshape(classes, -1)).view(rank, -1, self.gamma.shape[0])

    def _by_rank(self, u: Tensor) -> Tensor:
        """Reshape (T, K) to (R, T, N)."""
        return u.reshape(-1, *self.lam.shape).permute(1, 0, 2)

    def _classes(self, by_rank: Tensor) -> Tensor:
        """Apply lambda and Q^T to (R, T, N): (P, T, N)."""
        weighted = by_rank * self.lam.to(by_rank.dtype)[:, None, :]
        rank, classes = self.q.shape
        flat = torch.mm(self.q.to(by_rank.dtype).t(), weighted.reshape(rank, -1))
        return flat.view(classes, -1, self.gamma.shape[0])


def _pad(tensor: Tensor, columns: int) -> Tensor:
    """Pad with zeros to `columns` columns."""
    missing = columns - tensor.shape[1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def structured_costs(narrow: int, rank: int, bases: int, period: int, grid: tuple[int, int, int]) -> Costs:
    """FLOPs of the products with structured bases; `grid` is the result of `hadamard.grid`."""
    b, inner, outer = grid
    times_b = 2 * b * inner * (b + outer)
    times_af_t = 2 * bases * (period * -(-narrow // period) + period * rank)
    return Costs(narrow * times_b, times_b, times_af_t, 2 * times_af_t, 0, narrow * times_b + 4 * narrow * rank * bases)
