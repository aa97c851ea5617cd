"""Structured bases: small factors instead of large matrices; B is applied as two small matrices, A class by class.

The bases of a layer depend only on its shape and rank. The CRC-32 is that of the factors for the largest sizes, the
SHA-256 of older versions that of A and B as dense matrices of these sizes. Shapes and factors: see
`randlora_vision.bases.hadamard`; products: `randlora_vision.bases.products`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from randlora_vision.bases import hadamard
from randlora_vision.bases.base import Bases, sizes_of
from randlora_vision.bases.products import (
    Costs,
    add_product,
    diagonal_gradients,
    scaled_product,
)
from randlora_vision.checksums import SHA256, checksum

STRUCTURED = "structured"


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
        """As `Term.prepared`: gamma with the signs of A's columns, and in the layout of the products."""
        signed, scale = self.gamma * self.own.to(self.gamma.dtype), self.scale
        if self.right.dtype == torch.float16:
            power = 1 << (int(max(self.gamma.shape)) - 1).bit_length()  # c
            signed, scale = signed * power, scale / power
        in_classes = _in_classes(signed, self.q.shape[1])
        return SignedTerm(self.q, self.right, self.left, self.lam, signed, in_classes, scale, self.wide)


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
    gamma_in_classes: Tensor  # (P, N, C), see `_in_classes`
    scale: float
    wide: int

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""
        return self.q, self.right, self.left

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> SignedTerm:
        """The same term with its tensors replaced by these, or by None."""
        q, right, left = frozen
        in_classes: Any = None if gamma is None else _in_classes(gamma, q.shape[1])
        return SignedTerm(q, right, left, lam, gamma, in_classes, self.scale, self.wide)

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
        outer = self.left.shape[0]
        rows = (wide if b * outer == self.wide else self._unfold(wide)).reshape(-1, outer)
        half = torch.mm(self.left.to(wide.dtype).t(), rows.t()).reshape(inner, -1, b)
        u = torch.bmm(half, self.right.to(wide.dtype).transpose(1, 2))
        return u.permute(1, 0, 2).reshape(-1, inner * b)[:, : self.lam.numel()]

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""
        inner, b, _ = self.right.shape
        outer, missing = self.left.shape[0], inner * b - hidden.shape[1]
        padded = torch.constant_pad_nd(hidden, (0, missing)) if missing else hidden
        tokens = padded.reshape(-1, inner, b).permute(1, 0, 2)
        half = torch.bmm(tokens, self.right.to(hidden.dtype)).reshape(inner, -1).t()
        left = self.left.to(hidden.dtype).t()
        if b * outer == self.wide:
            if total is None:  # as `add_product` does, without the call
                return (torch.mm(half, left) * self.scale).reshape(-1, self.wide)
            folded = total.reshape(-1, outer)
            if folded.dtype == half.dtype:
                return torch.addmm(folded, half, left, alpha=self.scale).reshape(-1, self.wide)
            return add_product(folded, half, left, self.scale).reshape(-1, self.wide)
        out = self._fold((torch.mm(half, left) * self.scale).reshape(-1, b, outer), 1)
        return out if total is None else total + out.to(total.dtype)

    def times_af_t(self, narrow: Tensor, factor: float = 1.0, private: bool = False) -> tuple[Tensor, Tensor]:
        """Return ``factor`` times ``narrow`` (T, m) times Af^T: (T, K), and the same without lambda: (R, T, N)."""
        projected = self._project(_in_classes(narrow, self.q.shape[1]), factor, private)
        by_token = projected.permute(1, 0, 2)
        out = torch.empty_like(by_token, memory_format=torch.contiguous_format) if private else None
        return torch.mul(by_token, self.lam.to(narrow.dtype), out=out).flatten(1), projected

    def times_af(self, total: Tensor | None, u: Tensor, private: bool = False) -> tuple[Tensor, Tensor]:
        """Return ``total`` (T, m) + s u Af, and u with lambda and Q applied: (P, T, N)."""
        classes, gamma = self._classes(u, private), self.gamma_in_classes.to(u.dtype)
        added = total is not None and total.dtype == u.dtype
        if added:
            out = torch.baddbmm(_in_classes(total, gamma.shape[0]), classes, gamma, alpha=self.scale)  # type: ignore
        else:
            out = torch.bmm(classes, gamma) * self.scale
        out = out.permute(1, 0, 2).flatten(1)[:, : self.gamma.shape[1]]
        return out if added or total is None else total + out.to(total.dtype), classes

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""
        dtype, narrow = self.right.dtype, self.gamma.shape[1]
        signs = self.lam[:, :, None] * self.q[:, None, :].to(self.lam.dtype)
        af = (
            (signs[:, :, :, None] * self.gamma_in_classes.permute(1, 0, 2))
            .reshape(self.lam.numel(), -1)[:, :narrow]
            .to(dtype)
        )
        if not tall:
            return self.times_b_t(weight, af.t())
        inner, b, _ = self.right.shape
        outer, missing = self.left.shape[0], inner * b - af.shape[0]
        blocks = (torch.constant_pad_nd(af, (0, 0, 0, missing)) if missing else af).reshape(inner, b, narrow)
        half = torch.bmm(self.right.to(dtype).transpose(1, 2), blocks).permute(1, 0, 2)
        left = self.left.to(dtype).expand(b, -1, -1)
        if weight is not None and weight.dtype == dtype and b * outer == self.wide:
            out = torch.baddbmm(weight.reshape(b, outer, narrow), left, half, alpha=self.scale)
            return out.reshape(self.wide, narrow)
        delta = self._fold(torch.bmm(left, half), 0) * self.scale
        return delta if weight is None else weight + delta.to(weight.dtype)

    def gradients(
        self,
        u: Tensor,
        narrow: Tensor,
        private: bool = False,
        classes: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Products.gradients`."""
        by_class = _in_classes(narrow, self.q.shape[1])
        projected = self._project(by_class, self.scale, private) if projected is None else projected
        classes = self._classes(u, private) if classes is None else classes
        by_rank = u.reshape(-1, *self.lam.shape).permute(1, 0, 2)
        d_lam = (projected * by_rank).sum(1, dtype=self.lam.dtype)
        d_gamma = scaled_product(classes.transpose(1, 2), by_class, self.scale, private)
        d_gamma = d_gamma.permute(1, 0, 2).flatten(1)[:, : self.gamma.shape[1]]
        return d_lam, d_gamma.to(self.gamma.dtype)

    def weight_gradients(self, d_weight: Tensor, private: bool = False) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""
        inner, b, _ = self.right.shape
        narrow = self.gamma.shape[1]
        left, right = self.left.to(d_weight.dtype), self.right.to(d_weight.dtype)
        folded = self._unfold(d_weight.t()).permute(1, 2, 0)  # (q, p, m)
        half = torch.bmm(left.t().expand(b, -1, -1), folded).permute(1, 0, 2)
        d_af = scaled_product(right, half, self.scale, private).reshape(inner * b, narrow)[: self.lam.numel()]
        spread = self.q.repeat_interleave(self.gamma_in_classes.shape[2], dim=1)[:, :narrow].to(self.lam.dtype)
        return diagonal_gradients(spread, self.lam, self.gamma, d_af, private)

    def _fold(self, rows: Tensor, dim: int) -> Tensor:
        """Join the dimensions (q, p) at `dim` into one dimension of M rows."""
        b, outer = self.right.shape[1], self.left.shape[0]
        full = self.wide - b * (outer - 1)  # as `hadamard.full_rows`, without the call
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
        full = self.wide - b * (outer - 1)  # as `hadamard.full_rows`, without the call
        short = wide[:, full * outer :].reshape(tokens, b - full, outer - 1)
        long = wide[:, : full * outer].reshape(tokens, full, outer)
        return torch.cat([long, torch.constant_pad_nd(short, (0, 1))], 1)

    def _project(self, by_class: Tensor, factor: float, private: bool) -> Tensor:
        """Apply Af without lambda, and `factor`, to the result of `_in_classes` (P, T, C): (R, T, N)."""
        gamma = self.gamma_in_classes.to(by_class.dtype).transpose(1, 2)
        mixed = torch.bmm(by_class, gamma) if factor == 1.0 else scaled_product(by_class, gamma, factor, private)
        rank, classes = self.q.shape
        return torch.mm(self.q.to(by_class.dtype), mixed.reshape(classes, -1)).reshape(rank, -1, gamma.shape[2])

    def _classes(self, u: Tensor, private: bool) -> Tensor:
        """Apply lambda and Q^T to (T, K): (P, T, N)."""
        rank, classes = self.q.shape
        by_rank = u.reshape(-1, *self.lam.shape).permute(1, 0, 2)
        out = torch.empty_like(by_rank, memory_format=torch.contiguous_format) if private else None
        weighted = torch.mul(by_rank, self.lam.to(u.dtype)[:, None, :], out=out).reshape(rank, -1)
        return torch.mm(self.q.to(u.dtype).t(), weighted).reshape(classes, -1, self.lam.shape[1])


def _in_classes(rows: Tensor, classes: int) -> Tensor:
    """Reshape (T, m) to (P, T, C), with zeros for the missing columns."""
    size = -(-rows.shape[1] // classes)
    missing = classes * size - rows.shape[1]
    padded = torch.constant_pad_nd(rows, (0, missing)) if missing else rows
    return padded.reshape(-1, classes, size).permute(1, 0, 2)


class StructuredBases(Bases, kinds=(STRUCTURED,)):
    """Bases that are stored as small factors, created once per shape, device and dtype."""

    term_type = StructuredTerm

    def _of_term(
        self, lam: Tensor, gamma: Tensor, wide: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        rank, bases, narrow = sizes_of(lam, gamma)
        return self._beside((rank, narrow, wide, rank * bases), lam, dtype), (wide,)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """As `Bases.generate`."""
        return hadamard.dense(seed, matrix, rows, columns)

    def _made(self, key: Any, device: torch.device, dtype: torch.dtype) -> Iterable[Tensor]:
        rank, narrow, wide, columns = key
        seed = self.spec.seed
        arrays = (*hadamard.a_factors(seed, rank, narrow), *hadamard.b_factors(seed, wide, columns))
        return [torch.from_numpy(array).to(device=device, dtype=dtype) for array in arrays]

    def _computed(self, algorithm: str) -> str:
        if algorithm == SHA256:
            return super()._computed(algorithm)
        spec = self.spec
        sizes = (spec.rank, spec.narrow, spec.wide, spec.columns)
        factors = self._made(sizes, torch.device("cpu"), torch.int8)
        return checksum(factor.contiguous().numpy().data for factor in factors)

    def _is_awaited(self, matrix: int) -> bool:
        return False  # products use the factors: the matrices are written out for the SHA-256 alone

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes of the factors of the largest shape; other shapes take about as many."""
        spec = self.spec
        b, inner, outer = hadamard.grid(spec.wide, spec.columns)
        period = hadamard.period(spec.rank)
        return dtype.itemsize * (spec.rank * period + spec.narrow + inner * b * b + outer * inner)


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
