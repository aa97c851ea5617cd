"""The products of `terms.Term` for structured bases: B is applied as two small matrices, A class by class.

Shapes and definitions: `randlora_vision.structured_bases`. Further: P classes of C columns of A, t tokens.

Af of a token x is  h[k, n] = lambda[k, n] * sum_i Q[k, i] * (sum_c x[i, c] * s[i, c] * gamma[n, i, c])  with x cut into
its P classes: 2 m N + 2 N P R FLOPs a token instead of 2 m K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_vision.planner import Costs, structured_costs
from randlora_vision.structured_bases import full_rows
from randlora_vision.terms import add_product, diagonal_gradients, power, scaled_a


class StructuredTerm(NamedTuple):
    """Structured bases with their lambda and gamma. The factors are signs, exact in any dtype.

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
    def products(self) -> torch.dtype:
        """Dtype that matrix products run in."""
        return self.right.dtype

    @property
    def mixed_scale(self) -> float:
        """S / c: what products with values from `mix` are multiplied by."""
        return self.scale / power(self.gamma)

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        grid = (self.right.shape[1], self.right.shape[0], self.left.shape[0])
        return structured_costs(self.gamma.shape[1], self.lam.shape[0], self.lam.shape[1], self.q.shape[1], grid)

    def contract(self, wide: Tensor) -> Tensor:
        """(T, M) B: (T, K)."""
        inner, b, _ = self.right.shape
        outer, columns = self.left.shape[0], self.lam.numel()
        tokens = self._unfold(wide).reshape(-1, outer)
        half = torch.mm(tokens, self.left.to(wide.dtype)).reshape(-1, b, inner).permute(2, 0, 1)
        u = torch.bmm(half, self.right.to(wide.dtype).transpose(1, 2))
        return u.permute(1, 0, 2).reshape(-1, inner * b)[:, :columns]

    def spread(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Total (T, M) + s hidden (T, K) B^T, for hidden values from `mix`."""
        inner, b, _ = self.right.shape
        outer, factor = self.left.shape[0], self.mixed_scale
        tokens = _pad(hidden, inner * b).reshape(-1, inner, b).permute(1, 0, 2)
        half = torch.bmm(tokens, self.right.to(hidden.dtype)).permute(1, 2, 0).reshape(-1, inner)
        left = self.left.to(hidden.dtype).t()
        if b * outer == self.wide:
            folded = None if total is None else total.reshape(-1, outer)
            return add_product(folded, half, left, factor).reshape(-1, self.wide)
        out = self._fold(add_product(None, half, left, factor).reshape(-1, b, outer), 1)
        return out if total is None else total + out.to(total.dtype)

    def mix(self, narrow: Tensor) -> Tensor:
        """(T, m) Af^T: (T, K), times c."""
        hidden = self._project(narrow) * self.lam.to(narrow.dtype)[:, None, :]
        return hidden.permute(1, 0, 2).flatten(1)

    def unmix(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Total (T, m) + s u Af."""
        left, right = self._classes(self._by_rank(u)), self._gamma(u.dtype).transpose(1, 2)
        factor = self.mixed_scale
        if total is not None and total.dtype == u.dtype:
            out = torch.baddbmm(self._in_classes(total), left, right, alpha=factor)
            return self._joined(out)
        out = self._joined(torch.bmm(left, right) * factor)
        return out if total is None else total + out.to(total.dtype)

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Weight (O, I) + delta W."""
        dtype = self.products
        af = scaled_a(self._a(), self.lam, self.gamma, dtype)
        if not tall:
            return self.spread(weight, af.t())
        inner, b, _ = self.right.shape
        outer, narrow = self.left.shape[0], self.gamma.shape[1]
        blocks = F.pad(af, (0, 0, 0, inner * b - af.shape[0])).view(inner, b, narrow)
        half = torch.bmm(self.right.to(dtype).transpose(1, 2), blocks).permute(1, 0, 2)
        left = self.left.to(dtype).expand(b, -1, -1)
        factor = self.mixed_scale
        if weight is not None and weight.dtype == dtype and b * outer == self.wide:
            return torch.baddbmm(weight.reshape(b, outer, narrow), left, half, alpha=factor).view(self.wide, narrow)
        delta = self._fold(torch.bmm(left, half), 0) * factor
        return delta if weight is None else weight + delta.to(weight.dtype)

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""
        by_rank = self._by_rank(u)
        d_lam = (self._project(narrow) * by_rank).sum(1, dtype=self.lam.dtype) * self.mixed_scale
        d_classes = torch.bmm(self._classes(by_rank).transpose(1, 2), self._in_classes(narrow))
        return d_lam, self._joined(d_classes).to(self.gamma.dtype) * (self._own() * self.scale)

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the update's own, (M, m)."""
        d_af = self.contract(d_weight.t()).t()
        return diagonal_gradients(self._a(), self.lam, self.gamma, self.scale, d_af)

    def _fold(self, rows: Tensor, dim: int) -> Tensor:
        """(q, p) at `dim` and after it as one dimension of M rows."""
        b, outer = self.right.shape[1], self.left.shape[0]
        full = full_rows(self.wide, b, outer)
        if full == b:
            return rows.flatten(dim, dim + 1)
        short = rows.narrow(dim, full, b - full).narrow(dim + 1, 0, outer - 1)
        return torch.cat([rows.narrow(dim, 0, full).flatten(dim, dim + 1), short.flatten(dim, dim + 1)], dim)

    def _unfold(self, wide: Tensor) -> Tensor:
        """(T, M) as (T, q, p), with zeros for the rows that are not there."""
        b, outer = self.right.shape[1], self.left.shape[0]
        full, tokens = full_rows(self.wide, b, outer), wide.shape[0]
        if full == b:
            return wide.reshape(tokens, b, outer)
        short = wide[:, full * outer :].reshape(tokens, b - full, outer - 1)
        return torch.cat([wide[:, : full * outer].reshape(tokens, full, outer), F.pad(short, (0, 1))], 1)

    def _a(self) -> Tensor:
        """A (R, m), in the dtype of lambda."""
        narrow = self.gamma.shape[1]
        spread = self.q.repeat_interleave(self._class_size(), dim=1)[:, :narrow]
        return (spread * self.own).to(self.lam.dtype)

    def _own(self) -> Tensor:
        return self.own.to(self.gamma.dtype)

    def _class_size(self) -> int:
        return -(-self.gamma.shape[1] // self.q.shape[1])

    def _gamma(self, dtype: torch.dtype) -> Tensor:
        """Gamma with the signs of A's columns, times c: (P, C, N)."""
        classes, size, bases = self.q.shape[1], self._class_size(), self.gamma.shape[0]
        signed = self.gamma * (self._own() * power(self.gamma))
        return _pad(signed, classes * size).view(bases, classes, size).permute(1, 2, 0).to(dtype)

    def _in_classes(self, narrow: Tensor) -> Tensor:
        """(T, m) as (P, T, C)."""
        classes, size = self.q.shape[1], self._class_size()
        return _pad(narrow, classes * size).reshape(-1, classes, size).permute(1, 0, 2)

    def _joined(self, classes: Tensor) -> Tensor:
        """(P, T, C) as (T, m)."""
        return classes.permute(1, 0, 2).flatten(1)[:, : self.gamma.shape[1]]

    def _project(self, narrow: Tensor) -> Tensor:
        """Af of (T, m) without lambda: (R, T, N), times c."""
        mixed = torch.bmm(self._in_classes(narrow), self._gamma(narrow.dtype))
        rank, classes = self.q.shape
        return torch.mm(self.q.to(narrow.dtype), mixed.reshape(classes, -1)).view(rank, -1, self.gamma.shape[0])

    def _by_rank(self, u: Tensor) -> Tensor:
        """(T, K) as (R, T, N)."""
        return u.reshape(-1, *self.lam.shape).permute(1, 0, 2)

    def _classes(self, by_rank: Tensor) -> Tensor:
        """Lambda and Q^T on (R, T, N): (P, T, N)."""
        weighted = by_rank * self.lam.to(by_rank.dtype)[:, None, :]
        rank, classes = self.q.shape
        flat = torch.mm(self.q.to(by_rank.dtype).t(), weighted.reshape(rank, -1))
        return flat.view(classes, -1, self.gamma.shape[0])


def _pad(tensor: Tensor, columns: int) -> Tensor:
    """Columns of zeros up to `columns`."""
    missing = columns - tensor.shape[1]
    return F.pad(tensor, (0, missing)) if missing else tensor
