"""The sizes of the random bases of an adapter.

Shapes: A (R, m) and B (M, K), see `randlora_vision.bases`.
"""

from __future__ import annotations

import math

from randlora_vision.bases import Bases, BasesSpec
from randlora_vision.bases.peft import PEFT_KINDS
from randlora_vision.bases.stored import STORED
from randlora_vision.config import RandLoRAConfig
from randlora_vision.report import Target, smallest_bases

_LARGEST_RANK = 1024
"""The largest rank allowed for PEFT's bases if all layers are smaller than the rank."""


def bases_spec(config: RandLoRAConfig, targets: tuple[Target, ...], given: Bases | None = None) -> BasesSpec:
    """The spec of the smallest bases that fit all targets (PEFT: of its sizes), or of `given` ones; or ValueError."""
    needed = smallest_bases(targets)
    if config.bases in (STORED, *PEFT_KINDS) and needed["rank"] > max(needed["wide"], _LARGEST_RANK):
        # PEFT allows ranks above the narrow side, but B grows with the rank: a small file must not fill the memory.
        raise ValueError(f"rank {needed['rank']} is above every side of the adapted layers")
    if config.bases == STORED:
        if given is None:
            raise ValueError("bases='stored' needs an adapter file that holds the bases: choose another kind to train")
        for side, size in needed.items():
            if getattr(given.spec, side) < size:
                raise ValueError(f"the stored bases are too small: {side} {getattr(given.spec, side)}, needed {size}")
        return given.spec
    if config.bases not in PEFT_KINDS:
        _check_ranks(targets)
        return BasesSpec(config.bases, config.seed, **needed)
    if len({target.rank for target in targets}) > 1:
        raise ValueError(f"bases={config.bases!r} are PEFT's, which has one rank for all: leave out rank_pattern")
    return BasesSpec(config.bases, config.seed, **peft_sizes(targets))


def peft_sizes(targets: tuple[Target, ...]) -> dict[str, int]:
    """The sizes of PEFT's bases for these targets of one rank, given by the largest output and the largest input.

    Sizing by narrow and wide sides would suffice, and is smaller if a model has both tall and wide layers.
    """
    rank = targets[0].rank
    # The shape of a Conv1D is given as (I, O).
    shapes = [target.shape[::-1] if target.kind == "transposed" else target.shape for target in targets]
    sides = (max(out for out, _ in shapes), max(inner for _, inner in shapes))
    return {"rank": rank, "narrow": min(sides), "wide": max(sides), "columns": rank * math.ceil(min(sides) / rank)}


def _check_ranks(targets: tuple[Target, ...]) -> None:
    wrong = [target for target in targets if target.rank > target.narrow]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"rank {first.rank} is above the narrow side {first.narrow} of {first.name!r} "
            f"{first.shape[0]} x {first.shape[1]} ({len(wrong)} such targets): lower the rank, exclude them with "
            "exclude_modules, or give them a smaller one in rank_pattern"
        )
