"""Bases given as tensors, from a checkpoint of another library, rather than drawn from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from randlora_vision.bases.base import Bases, BasesSpec, adopt, matrices_checksum, outside_modes
from randlora_vision.bases.dense import DenseBases
from randlora_vision.checksums import CRC32

STORED = "stored"


@dataclasses.dataclass(frozen=True)
class StoredSpec(BasesSpec):
    """Sizes and identity of stored bases; equal specs stand for equal numbers, which `stored_bases` ensures."""

    crc32: str  # as `randlora_vision.bases.Bases.crc32`


class StoredBases(DenseBases):
    """A pair of given tensors; adapters with equal tensors share one object, and pickling stores the values."""

    def __init__(self, spec: StoredSpec, a: Tensor, b: Tensor) -> None:
        super().__init__(spec)
        self.given = (a, b)
        self._checksums[CRC32] = spec.crc32

    def _source(self, matrix: int) -> Tensor:
        return self.given[matrix]

    def __reduce__(self) -> tuple[Callable[..., Bases], tuple[Any, ...]]:
        return stored_bases, self.given


def stored_bases(a: Tensor, b: Tensor) -> StoredBases:
    """The one live object for A (R, m) and B (M, K) in float32.

    Raises:
        ValueError: Unless they are finite matrices, or if others of the same sizes and CRC-32 are in use.
    """
    for name, tensor in (("A", a), ("B", b)):
        if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.numel():
            raise ValueError(f"base {name} must be a matrix of floats, got {tensor.dtype} {tuple(tensor.shape)}")

    def adopted() -> StoredBases:
        given = [tensor.detach().to(device="cpu", dtype=torch.float32).contiguous() for tensor in (a, b)]
        own_a, own_b = (tensor.clone() for tensor in given)  # tensors of a file change when the file does
        if not (own_a.isfinite().all() and own_b.isfinite().all()):
            raise ValueError("the stored bases hold numbers that are not finite")
        (rank, narrow), (wide, columns) = own_a.shape, own_b.shape
        spec = StoredSpec(STORED, 0, rank, narrow, wide, columns, matrices_checksum(own_a, own_b))
        bases = adopt(StoredBases(spec, own_a, own_b))
        assert isinstance(bases, StoredBases)
        if not all(map(torch.equal, bases.given, (own_a, own_b))):
            raise ValueError(f"other stored bases of the same sizes and CRC-32 ({spec.crc32}) are in use")
        return bases

    return outside_modes(adopted)
