"""The frozen random bases A and B, drawn from a seed and bit-identical on every machine and version.

Shapes: A (R, m) float32, ONE for all bases and layers; B (M, K) float32 with K = N * R columns, shared by all layers.

Both are windows into infinite matrices: a slice of a large basis equals the small basis, adapters of different rank
share one B, and the size of a model never changes the values that a layer uses. Structured bases are the exception.

Each kind is defined in a separate file of this package and registers itself as a subclass of `Bases`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from randlora_vision.bases.products import Term

A, B = 0, 1


@dataclasses.dataclass(frozen=True)
class BasesSpec:
    """Everything that determines a pair of bases.

    Attributes:
        kind: One of `randlora_vision.config.BASES_KINDS`.
        seed: Key of the generator.
        rank: Rows of A (the largest rank among the adapted targets).
        narrow: Columns of A (the largest m).
        wide: Rows of B (the largest M).
        columns: Columns of B (the largest N * R).
    """

    kind: str
    seed: int
    rank: int
    narrow: int
    wide: int
    columns: int


class Bases:
    """A pair of bases, generated on first use and kept once per device and dtype.

    It is shared by every layer of an adapter and is not part of the module tree: copies of a model share it, and
    pickling stores only its spec.
    """

    kinds: ClassVar[dict[str, type[Bases]]] = {}
    """The subclass for each kind that is drawn from a seed."""

    def __init_subclass__(cls, kinds: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        Bases.kinds.update(dict.fromkeys(kinds, cls))

    def __init__(self, spec: BasesSpec) -> None:
        self.spec = spec
        self._tensors: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._sha256: str | None = None
        self._drawn: dict[int, Tensor] = {}
        """Matrices drawn for the checksum, kept until they are converted to the dtype of the products."""

    def a(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A (rank, narrow) on `device`, rounded to `dtype`."""
        return self._get(A, device, dtype)

    def b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B (wide, columns) on `device`, rounded to `dtype`."""
        return self._get(B, device, dtype)

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> Term:
        """The update of one adapter on one parameter.

        Args:
            lam: lambda (R, N).
            gamma: gamma (N, m).
            wide: M.
            scale: s = alpha / rank times the run-time scale.
            dtype: The dtype of the matrix products.
        """
        raise NotImplementedError

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """Generate a (rows, columns) float32 matrix of unit variance.

        Args:
            kind: One of the kinds of this class.
            seed: Key of the generator.
            matrix: 0 for A, 1 for B, which use separate streams.
            rows: Number of rows.
            columns: Number of columns.
            narrow: Narrow side, which sets the density of ``very_sparse``; other kinds ignore it.
        """
        raise NotImplementedError

    def _get(self, matrix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors.get((matrix, device, dtype))
        return self._make(matrix, device, dtype) if tensor is None else tensor

    @torch.compiler.disable
    def _make(self, matrix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Under inference_mode the result would be a tensor that autograd cannot save later.
        with torch.inference_mode(False):
            if device.type == "meta":
                tensor = torch.empty(self._shape(matrix), dtype=dtype, device=device)
            else:
                tensor = self._draw(matrix, dtype).to(device=device, dtype=dtype)
        self._tensors[(matrix, device, dtype)] = tensor
        return tensor

    def _draw(self, matrix: int, dtype: torch.dtype) -> Tensor:
        """The matrix in the dtype from which it is best converted to `dtype`."""
        return self._source(matrix)

    def _source(self, matrix: int) -> Tensor:
        """The matrix in float32: an existing copy if there is one, otherwise a newly drawn one."""
        for (which, device, dtype), tensor in self._tensors.items():
            if which == matrix and dtype == torch.float32 and device.type != "meta":
                return tensor
        return self._drawn.pop(matrix) if matrix in self._drawn else self._numbers(matrix)

    def _numbers(self, matrix: int) -> Tensor:
        """A newly drawn matrix, in float32."""
        spec = self.spec
        rows, columns = self._shape(matrix)
        return torch.from_numpy(self.generate(spec.kind, spec.seed, matrix, rows, columns, spec.narrow))

    def _shape(self, matrix: int) -> tuple[int, int]:
        spec = self.spec
        return (spec.rank, spec.narrow) if matrix == A else (spec.wide, spec.columns)

    @property
    def sha256(self) -> str:
        """SHA-256 of A, then B, as little-endian float32, row by row."""
        if self._sha256 is None:
            drawn = {matrix: self._source(matrix) for matrix in (A, B)}
            self._sha256 = sha256_of(drawn[A], drawn[B])
            self._drawn = {matrix: tensor for matrix, tensor in drawn.items() if self._is_awaited(matrix)}
        return self._sha256

    def _is_awaited(self, matrix: int) -> bool:
        """True until products use the matrix; after that, a drawn copy would only take memory."""
        return all(which != matrix for which, _, _ in self._tensors)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes per device if matrix products run in `dtype` and lambda and gamma are float32."""
        return 4 * self.spec.rank * self.spec.narrow + dtype.itemsize * self.spec.wide * self.spec.columns

    @property
    def nbytes(self) -> int:
        """Bytes per device if matrix products run in float32."""
        return self.bytes_in(torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bases:
        return self

    def __reduce__(self) -> tuple[Callable[[BasesSpec], Bases], tuple[BasesSpec]]:
        return get_bases, (self.spec,)

    def __repr__(self) -> str:
        return f"Bases({self.spec})"


_LIVE: weakref.WeakValueDictionary[BasesSpec, Bases] = weakref.WeakValueDictionary()


def sha256_of(a: Tensor, b: Tensor) -> str:
    """SHA-256 of two float32 matrices as little-endian numbers, row by row."""
    digest = hashlib.sha256()
    for tensor in (a, b):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy(), dtype="<f4").data)
    return digest.hexdigest()


def adopt(bases: Bases) -> Bases:
    """Return the live object with this spec; if there is none, register `bases` as that object."""
    return _LIVE.setdefault(bases.spec, bases)


def get_bases(spec: BasesSpec) -> Bases:
    """The one live `Bases` object of a spec; all models and adapters that use it share its memory."""
    bases = _LIVE.get(spec)
    if bases is None:
        bases = _LIVE[spec] = Bases.kinds[spec.kind](spec)
    return bases
