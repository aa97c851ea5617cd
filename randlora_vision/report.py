"""Reports of what an injection did or would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from randlora_vision.config import RandLoRAConfig
from randlora_vision.names import listing, table, without_numbers


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter.

    Attributes:
        name: Module path for a layer's ``weight``, else the parameter's path.
        kind: "linear", "transposed" (Conv1D of transformers, whose weight and `shape` are (I, O)), "attention",
            "convolution", "parameter" or "quantized".
        shape: (O, I), with convolution kernels flattened into I.
        rank: The rank R.
        alpha: The update is scaled by alpha / R.
        bases: The number of bases N = ceil(m / R).
        aliases: Other names of the same (tied or shared) parameter.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    bases: int
    aliases: tuple[str, ...] = ()

    @property
    def narrow(self) -> int:
        """The narrow side m."""
        return min(self.shape)

    @property
    def trained_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lambda (R, N) and gamma (N, m)."""
        return (self.rank, self.bases), (self.bases, self.narrow)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: R * N + N * m."""
        return self.bases * (self.rank + self.narrow)


def smallest_bases(targets: Sequence[Target]) -> dict[str, int]:
    """The sizes of the smallest bases that fit all targets, by the names of the fields of `BasesSpec`."""
    return {
        "rank": max(target.rank for target in targets),
        "narrow": max(target.narrow for target in targets),
        "wide": max(max(target.shape) for target in targets),
        "columns": max(target.rank * target.bases for target in targets),
    }


@dataclasses.dataclass(frozen=True)
class InjectionReport:
    """The result of `plan` and `inject`; ``str(report)`` is a table.

    Attributes:
        adapter_name: The adapter's name.
        config: The adapter's configuration.
        targets: The adapted parameters.
        skipped: (name, reason) of each weight that was requested, or that belongs to the preset, but is not adapted;
            for an adapter from a file, of each one that has the name of a listed weight except for its numbers.
        saved: (path, size) of each parameter trained in full (`modules_to_save`) and of each buffer of its module.
        saved_parameters: Total size of the parameters trained in full.
        warnings: Warnings, such as patterns that match nothing.
        base_parameters: Number of parameters of the base model.
        bases_bytes: Memory of the shared random bases (which are not stored in the file).
        file_bytes: Size of the file that `save_adapter` writes.
    """

    adapter_name: str
    config: RandLoRAConfig
    targets: tuple[Target, ...]
    skipped: tuple[tuple[str, str], ...]
    saved: tuple[tuple[str, int], ...]
    saved_parameters: int
    warnings: tuple[str, ...]
    base_parameters: int
    bases_bytes: int
    file_bytes: int

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, including `modules_to_save`."""
        return sum(target.num_parameters for target in self.targets) + self.saved_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report in plain JSON types."""
        values = dataclasses.asdict(self)
        values["config"] = self.config.to_dict()
        values["num_parameters"] = self.num_parameters
        return values

    def __str__(self) -> str:
        rows = [("target", "kind", "shape", "rank", "bases", "trained")]
        groups: dict[tuple[str, ...], list[Target]] = {}
        for target in self.targets:
            out_features, in_features = target.shape
            pattern = without_numbers(target.name)
            shape = f"{out_features} x {in_features}"
            groups.setdefault((pattern, target.kind, shape, str(target.rank), str(target.bases)), []).append(target)
        for (pattern, *rest), members in groups.items():
            count = f" (x{len(members)})" if len(members) > 1 else ""
            trained = sum(target.num_parameters for target in members)
            rows.append((pattern + count, *rest, f"{trained:,}"))  # type: ignore[arg-type]
        rows += [(name, "saved whole", "", "", "", f"{count:,}") for name, count in self.saved]
        stored = "all in the file" if self.config.bases == "stored" else f"0 in the file (seed {self.config.seed})"
        share = 100 * self.num_parameters / max(1, self.base_parameters)
        lines = [
            *table(rows, left=2),
            "",
            f"adapter {self.adapter_name!r}: {len(self.targets)} targets, {self.num_parameters:,} trained numbers "
            f"({share:.2f}% of the base's {self.base_parameters:,})",
            f"file: {self.file_bytes:,} bytes; bases: {self.bases_bytes:,} bytes in memory, {stored}. "
            "A larger rank trains fewer numbers.",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"skipped ({reason}): {listing(names, 4)}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
