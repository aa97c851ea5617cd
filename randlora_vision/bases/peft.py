"""The random bases that PEFT's RandLora draws from its `projection_prng_key`, for interchange.

Shapes: A (R, m), B (M, K) with K = N * R, column n * R + k being column k of PEFT's n-th block.

torch guarantees its random stream only within one version, and PEFT draws dense bases in bfloat16 or, on hardware
without it, in float16, so the same key can give different values. Hence there is a kind for each of the two dtypes,
and a checksum is stored beside the seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from randlora_vision.bases.dense import DenseBases

PEFT_KINDS = ("peft", "peft_float16", "peft_sparse", "peft_very_sparse")
"""PEFT's uniform bases drawn in bfloat16 and in float16, and its ``sparse`` and ``very_sparse`` bases."""
_DENSE = {"peft": torch.bfloat16, "peft_float16": torch.float16}


class PeftBases(DenseBases, kinds=PEFT_KINDS):
    """The bases that PEFT draws from the same seed."""

    def _numbers(self, matrix: int) -> Tensor:
        spec = self.spec
        pair = draw(spec.kind, spec.seed, spec.rank, spec.narrow, spec.wide)  # both from one stream, A first
        if self._is_awaited(1 - matrix):
            self._drawn[1 - matrix] = pair[1 - matrix]
        return pair[matrix]


def draw(kind: str, seed: int, rank: int, narrow: int, wide: int) -> tuple[Tensor, Tensor]:
    """Draw A (rank, narrow) and B (wide, rank * ceil(narrow / rank)) as PEFT does for this key, in float32.

    `narrow` is PEFT's m, min(largest output, largest input) of the adapted layers; `wide` is their largest side.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    bases = math.ceil(narrow / rank)
    with torch.device("cpu"):
        if kind in _DENSE:
            a = _kaiming((rank, 1, narrow), _DENSE[kind], generator)
            b = torch.cat([_kaiming((wide, 1, rank), _DENSE[kind], generator) for _ in range(bases)], dim=1)
        else:
            third = math.sqrt(narrow) if kind == "peft_very_sparse" else 3
            a = _ternary(torch.rand((rank, 1, narrow), generator=generator, dtype=torch.float32), third)
            b = _ternary(torch.rand((wide, bases, rank), generator=generator, dtype=torch.float32), third)
        # PEFT divides in the dtype it drew in, before any conversion to float32.
        return (a / a.std())[:, 0].float(), (b / b.std()).flatten(1).float()


def _kaiming(shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    empty = torch.empty(shape, dtype=dtype)
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def _ternary(uniform: Tensor, sparsity: float) -> Tensor:
    edge = 1 / (2 * sparsity)
    return (uniform > 1 - edge).float() - (uniform < edge).float()
