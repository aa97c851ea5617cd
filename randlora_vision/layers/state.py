"""What one adapted weight knows of its adapters."""

from __future__ import annotations

import dataclasses

from torch import nn

from randlora_vision.bases import Bases
from randlora_vision.compute.planner import ANY, PINNED, Plan


@dataclasses.dataclass
class Switches:
    """Which adapters of a model act: one object for all of its adapted weights."""

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True


@dataclasses.dataclass
class AdapterSlot:
    """One adapter on one parameter."""

    rank: int
    bases_count: int
    alpha: float
    dropout: float
    bases: Bases
    trainable: bool
    compute: str = "auto"
    scale: float = 1.0
    """Run-time factor, 1 unless `set_scale` says otherwise."""

    @property
    def factor(self) -> float:
        """S of the update: alpha / rank times the run-time scale."""
        return self.alpha / self.rank * self.scale


@dataclasses.dataclass
class ParameterState:
    """The adapters of one parameter; tied owners share one object."""

    out_features: int
    in_features: int
    switches: Switches
    slots: dict[str, AdapterSlot] = dataclasses.field(default_factory=dict)
    transposed: bool = False
    """The module stores (I, O), as transformers' Conv1D does: the update is meant for the transpose."""
    original: nn.Parameter | None = None
    """The base's own Parameter while `merged` is not empty: what makes unmerging bit-exact."""
    written: bool = False
    """PEFT merged adapters of its own into the merged weight, or took them out of it."""

    def pinned(self, names: list[str]) -> Plan:
        """The orders of computation that the named adapters agree on."""
        wanted = {self.slots[name].compute for name in names}
        return PINNED[wanted.pop()] if len(wanted) == 1 else ANY

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that the weight holds."""
        return tuple(name for name in self.switches.merged if name in self.slots)

    def live(self) -> list[str]:
        """Names of the adapters that act on the effective weight."""
        switches, slots = self.switches, self.slots
        if not switches.enabled:
            return []
        active = (name for name in switches.active if name in slots and name not in switches.merged)
        return [name for name in active if slots[name].scale != 0]
