"""The frozen random bases A and B, drawn from a seed and bit-identical on every machine and version.

Shapes: A (R, m) float32, ONE for all bases and layers; B (M, K) float32 with K = N * R columns, shared by all layers.

Both are windows into infinite matrices: a slice of a large basis equals the small basis, adapters of different rank
share one B, and the size of a model never changes the values that a layer uses. Structured bases are the exception.

Each kind is defined in a separate file of this package and registers itself as a subclass of `Bases`.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from randlora_vision.bases.products import Term
from randlora_vision.checksums import CRC32, SHA256, checksum
from randlora_vision.torch_internals import assumed_constant, fake_mode_of, is_jit_tracing

A, B = 0, 1
_Made = TypeVar("_Made")


@dataclasses.dataclass(frozen=True)
class BasesSpec:
    """Everything that determines a pair of bases."""

    kind: str  # one of `randlora_vision.config.BASES_KINDS`
    seed: int  # key of the generator
    rank: int  # rows of A (the largest rank among the adapted targets)
    narrow: int  # columns of A (the largest m)
    wide: int  # rows of B (the largest M)
    columns: int  # columns of B (the largest N * R)


class Bases:
    """A pair of bases, generated on first use and kept once per device and dtype.

    It is shared by every layer of an adapter and is not part of the module tree: copies of a model share it, and
    pickling stores only its spec.
    """

    kinds: ClassVar[dict[str, type[Bases]]] = {}
    """The subclass for each kind that is drawn from a seed."""
    term_type: ClassVar[Callable[..., Any]]
    """The class of the terms, called with the tensors of `_of_term`, lambda, gamma, the scale, and its other values."""

    def __init_subclass__(cls, kinds: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        Bases.kinds.update(dict.fromkeys(kinds, cls))

    def __init__(self, spec: BasesSpec) -> None:
        self.spec = spec
        self._tensors: dict[tuple[Hashable, torch.device, torch.dtype], tuple[Tensor, ...]] = {}
        self._checksums: dict[str, str] = {}
        self._unchecked: weakref.WeakKeyDictionary[object, Callable[[Bases], object]] = weakref.WeakKeyDictionary()
        """Checks to be made before the first use, for adapters that had no use for the bases when they were loaded."""
        self._drawn: dict[int, Tensor] = {}
        """Matrices drawn for the checksum, kept until they are converted to the dtype of the products."""
        self._found: dict[Hashable, tuple[tuple[Tensor, ...], tuple[Any, ...]]] = {}
        """The constants of terms that were made for plain parameters, which are the same for each of these shapes."""
        self._inputs = _Inputs()

    def a(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A (rank, narrow) on `device`, rounded to `dtype`."""
        return self.kept(A, device, dtype)[0]

    def b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B (wide, columns) on `device`, rounded to `dtype`."""
        return self.kept(B, device, dtype)[0]

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> Term:
        """The update of one adapter on one parameter, for M = `wide` and s = `scale`; every forward pass needs it."""
        # Fake tensors and those of transforms are not Parameters, and compiled code multiplies lambda by its scale.
        plain = type(lam) is nn.Parameter and not is_jit_tracing()
        key = (wide, lam.shape, gamma.shape, dtype, lam.dtype, lam.device) if plain else None
        found = self._found.get(key) if plain else None
        if found is None:
            found = self._of_term(lam, gamma, wide, dtype)
            if plain and not torch.compiler.is_dynamo_compiling():
                self._found[key] = found
        frozen, others = found
        return self.term_type(*frozen, lam, gamma, scale, *others)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """Generate matrix 0 (A) or 1 (B), (rows, columns), in float32 with unit variance.

        `narrow`, the narrow side, sets the density of ``very_sparse``; other kinds ignore it.
        """
        raise NotImplementedError

    def kept(self, key: Hashable, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The tensors of a key, drawn on first use: `A`, `B`, or what a term needs, such as a part of a matrix.

        Raises RuntimeError on first use while a CUDA graph is captured.
        """
        tensors = self._tensors.get((key, device, dtype))
        return self._keep(key, device, dtype) if tensors is None else tensors

    def _of_term(
        self, lam: Tensor, gamma: Tensor, wide: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The tensors of the bases and the other constants of a term that is not in `_found`."""
        raise NotImplementedError

    def _beside(self, key: Hashable, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The tensors of a key for products with `like`: those of `kept`, or fake ones."""
        if torch.compiler.is_dynamo_compiling():
            return getattr(self._inputs, self._input(key, like.device, dtype))
        fake_mode = fake_mode_of(like)
        if fake_mode is None:
            return self.kept(key, like.device, dtype)
        sizes = [tensor.shape for tensor in self.kept(key, torch.device("meta"), dtype)]

        def make() -> tuple[Tensor, ...]:
            with fake_mode:
                return tuple([torch.empty(size, dtype=dtype, device=like.device) for size in sizes])

        return outside_modes(make)

    @assumed_constant
    def _input(self, key: Hashable, device: torch.device, dtype: torch.dtype) -> str:
        """The name of an attribute of `_inputs` with the tensors; torch.compile calls this while it traces."""
        name = re.sub(r"\W+", "_", f"kept {key} {device} {dtype}")
        setattr(self._inputs, name, self.kept(key, device, dtype))
        return name

    def _keep(self, key: Hashable, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the random bases of an adapter are drawn in the first forward pass on a device, which cannot be "
                "captured in a CUDA graph: run the model once before the capture"
            )
        if device.type != "meta":
            self._check()

        def make() -> tuple[Tensor, ...]:
            # torch.compile never makes the sizes of Parameters symbolic.
            return tuple([nn.Parameter(made, requires_grad=False) for made in self._made(key, device, dtype)])

        self._tensors[(key, device, dtype)] = tensors = outside_modes(make)
        return tensors

    def _made(self, key: Any, device: torch.device, dtype: torch.dtype) -> Iterable[Tensor]:
        if device.type == "meta":
            return (torch.empty(self._shape(key), dtype=dtype, device=device),)
        return (self._draw(key, dtype).to(device=device, dtype=dtype),)

    def _draw(self, matrix: int, dtype: torch.dtype) -> Tensor:
        """The matrix in the dtype from which it is best converted to `dtype`."""
        return self._source(matrix)

    def _source(self, matrix: int) -> Tensor:
        """The matrix in float32: an existing copy if there is one, otherwise a newly drawn one."""
        for (which, device, dtype), (tensor, *_) in self._tensors.items():
            if which == matrix and dtype == torch.float32 and device.type != "meta":
                return tensor
        return self._drawn.pop(matrix) if matrix in self._drawn else self._numbers(matrix)

    def _numbers(self, matrix: int) -> Tensor:
        spec = self.spec
        rows, columns = self._shape(matrix)
        return torch.from_numpy(self.generate(spec.kind, spec.seed, matrix, rows, columns, spec.narrow))

    def _shape(self, matrix: int) -> tuple[int, int]:
        spec = self.spec
        return (spec.rank, spec.narrow) if matrix == A else (spec.wide, spec.columns)

    @property
    def crc32(self) -> str:
        """CRC-32 of what the bases are made of: A, then B, as little-endian float32, row by row; 8 digits."""
        return self.checksum(CRC32)

    @property
    def sha256(self) -> str:
        """SHA-256 of A, then B, as little-endian float32, row by row, which older versions wrote; 64 digits."""
        return self.checksum(SHA256)

    def checksum(self, algorithm: str) -> str:
        """The digits of `crc32` or `sha256`; the matrices are drawn for it on first use."""
        self._check()
        if algorithm not in self._checksums:
            self._checksums[algorithm] = outside_modes(partial(self._computed, algorithm))
        return self._checksums[algorithm]

    def _computed(self, algorithm: str) -> str:
        drawn = {matrix: self._source(matrix) for matrix in (A, B)}
        self._drawn = {matrix: tensor for matrix, tensor in drawn.items() if self._is_awaited(matrix)}
        return matrices_checksum(drawn[A], drawn[B], algorithm)

    def check_before_use(self, check: Callable[[Bases], object], owner: object) -> None:
        """Call `check`, which raises an error if these are not the right bases, before a matrix is drawn.

        It stays to be called until it has passed or its owner is gone.
        """
        self._unchecked[owner] = check

    def _check(self) -> None:
        waiting, self._unchecked = self._unchecked, weakref.WeakKeyDictionary()  # checks compute checksums themselves
        try:
            for check in list(waiting.values()):
                check(self)
            waiting.clear()
        finally:
            self._unchecked = waiting

    @property
    def is_drawn(self) -> bool:
        """True if there are matrices outside of the meta device, or a checksum for which they were drawn."""
        return bool(self._checksums) or any(device.type != "meta" for _, device, _ in self._tensors)

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


class _Inputs:
    """Tensors under names: compiled code takes attributes as inputs, also those that were set during its tracing."""


def outside_modes(make: Callable[[], _Made]) -> _Made:
    """Call `make` where no mode of PyTorch is on: fake tensors, tracing, torch.func, inference, a default device.

    What it returns may be kept for the whole process, so it must not depend on who needs it first. Modes belong to a
    thread, so a new thread has none of them.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def sizes_of(lam: Tensor, gamma: Tensor) -> tuple[int, int, int]:
    """R, N and m as numbers, which sizes are not while torch.jit traces."""
    rank, bases = lam.shape
    return int(rank), int(bases), int(gamma.shape[1])


def matrices_checksum(a: Tensor, b: Tensor, algorithm: str = CRC32) -> str:
    """The checksum of two float32 matrices as little-endian numbers, row by row."""
    return checksum((np.ascontiguousarray(each.cpu().numpy(), dtype="<f4").data for each in (a, b)), algorithm)


def adopt(bases: Bases) -> Bases:
    """Return the live object with this spec; if there is none, register `bases` as that object."""
    return _LIVE.setdefault(bases.spec, bases)


def get_bases(spec: BasesSpec) -> Bases:
    """The one live `Bases` object of a spec; all models and adapters that use it share its memory."""
    bases = _LIVE.get(spec)
    if bases is None:
        bases = _LIVE[spec] = Bases.kinds[spec.kind](spec)
    return bases
