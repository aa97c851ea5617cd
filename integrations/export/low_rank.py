"""The best low-rank approximation of an update, and its error.

Shapes: O out, I in, r rank that is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora_vision.names import table


@dataclasses.dataclass(frozen=True)
class Choice:
    """How much of an update to keep: a rank, or the smallest rank that keeps a share of the squared Frobenius norm.

    Raises:
        ValueError: Unless exactly one of the two is given and it is in range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank (of every layer) or energy (share of the squared norm), one of the two")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank!r}")
        number = isinstance(self.energy, (int, float)) and not isinstance(self.energy, bool)
        if self.energy is not None and not (number and 0 < self.energy <= 1):
            raise ValueError(f"energy must be a number above 0 and at most 1, got {self.energy!r}")


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The error of one exported layer.

    Attributes:
        name: Path of the adapted parameter.
        shape: (O, I), with convolution kernels flattened into I.
        rank: The rank that was kept; None if the complete update is stored.
        norm: Frobenius norm of the update.
        error: Frobenius norm of the difference, divided by `norm`; 0 for an update of zeros.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    norm: float
    error: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Result of an export; ``str(report)`` is a table.

    Attributes:
        format: Format of the file.
        path: The file or folder that was written.
        choice: The requested rank or energy; None if complete updates are stored.
        layers: The layers in the order of the file.
    """

    format: str
    path: str
    choice: Choice | None
    layers: tuple[LayerError, ...]

    @property
    def error(self) -> float:
        """Relative error of all updates together in the Frobenius norm."""
        total = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.norm * layer.error for layer in self.layers)) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain JSON types."""
        return {**dataclasses.asdict(self), "error": self.error}

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file: the report without the path, which is specific to this machine."""
        values = {key: value for key, value in self.to_dict().items() if key != "path"}
        return {"format": "pt", "randlora_export": json.dumps(values, separators=(",", ":"))}

    def __str__(self) -> str:
        rows = [("layer", "shape", "rank", "norm", "relative error")]
        for layer in self.layers:
            kept = "full" if layer.rank is None else str(layer.rank)
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append((layer.name, shape, kept, f"{layer.norm:.4g}", f"{layer.error:.2%}"))
        return "\n".join(
            [*table(rows), "", f"{self.path} ({self.format}): relative error of all layers {self.error:.2%}"]
        )


class Factors(NamedTuple):
    """Two layers in a row: ``up`` (O, r, 1...) and ``down`` (r, I...), with the kernel of a convolution in `down`."""

    up: Tensor
    down: Tensor

    def padded(self, rank: int) -> Factors:
        """Return the same product with zeros up to the given rank."""
        more = rank - len(self.down)
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more, *self.up.shape[2:])], dim=1)
        return Factors(up, torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])]))


def approximate(name: str, delta: Tensor, choice: Choice | None) -> tuple[Tensor | Factors, LayerError]:
    """Return the best approximation of an update (O, I...) of the chosen rank, and its error.

    This is the truncated singular value decomposition (Eckart and Young), with the square roots of the singular values
    in both factors. Without a choice, the result is the update itself.
    """
    flat = delta.flatten(1)
    norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    shape = (flat.shape[0], flat.shape[1])
    if choice is None:
        return delta, LayerError(name, shape, None, norm, 0.0)
    u, values, v = torch.linalg.svd(flat, full_matrices=False)
    rank = min(_rank(values, choice), len(values))
    root = values[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    lost = float(torch.linalg.vector_norm(flat - up @ down, dtype=torch.float64))
    kernel = delta.shape[2:]
    factors = Factors(up.reshape(*up.shape, *(1,) * len(kernel)), down.reshape(-1, *delta.shape[1:]))
    return factors, LayerError(name, shape, rank, norm, lost / norm if norm else 0.0)


def _rank(values: Tensor, choice: Choice) -> int:
    if choice.rank is not None:
        return choice.rank
    assert choice.energy is not None
    kept = values.double().square().cumsum(0)
    if kept[-1] == 0:
        return 1
    # With energy 1, rounding of the sum must not require a rank above the number of singular values.
    return int((kept < choice.energy * kept[-1] * (1 - 1e-12)).sum()) + 1
