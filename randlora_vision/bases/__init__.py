"""The frozen random matrices A and B; importing this package registers every kind of bases."""

import numpy as np

from randlora_vision.bases import dense as dense
from randlora_vision.bases import peft as peft
from randlora_vision.bases import structured as structured
from randlora_vision.bases import ternary as ternary
from randlora_vision.bases.base import Bases, BasesSpec, adopt, get_bases

__all__ = ["Bases", "BasesSpec", "adopt", "generate", "get_bases"]


def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
    """Call `Bases.generate` of the class that implements the kind."""
    return Bases.kinds[kind].generate(kind, seed, matrix, rows, columns, narrow)
