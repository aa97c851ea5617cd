"""The adapter state of one adapted weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.bases import Bases
from randlora_vision.compute.planner import ANY, PINNED, Plan


@dataclasses.dataclass
class Mixture:
    """The adapters of one batch, within `randlora_vision.per_sample`."""

    names: tuple[str | None, ...]
    """The adapter of every sample; None stands for the base."""
    paths: dict[int, str]
    """Identity -> path of every module of the model, for messages."""
    recorded: bool = False
    """True if gradients of lambda and gamma were recorded in the block."""
    in_model: bool = False
    """True during a call of the whole model, whose input has the right batch size."""

    def __post_init__(self) -> None:
        self.distinct = tuple(dict.fromkeys(self.names))
        self.samples = len(self.names)


@dataclasses.dataclass
class Switches:
    """Which adapters of a model are in effect; all adapted weights of the model share one object."""

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    call_scale: float = 1.0
    """Factor of all updates during one call, from the arguments that a host passes."""
    mixture: Mixture | None = None
    """The adapters of the samples instead of `active`."""


@dataclasses.dataclass
class AdapterSlot:
    """One adapter on one parameter."""

    rank: int
    bases_count: int
    alpha: float
    dropout: float
    bases: Bases
    trainable: bool
    start: tuple[float, float]
    """The values of lambda and gamma before training."""
    compute: str = "auto"
    scale: float = 1.0
    """Run-time factor, 1 unless changed by `set_scale`."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "scale":
            self.own_factor = self.factor(1.0)
            with torch.inference_mode(False):
                self.factor_input = torch.tensor(self.own_factor, dtype=torch.float32, device="cpu")

    def factor(self, call_scale: float) -> float:
        """The scale s: alpha / rank times the run-time scale and that of this call."""
        return self.alpha / self.rank * (self.scale * call_scale)


@dataclasses.dataclass
class ParameterState:
    """The adapters of one parameter; tied owners share one object."""

    out_features: int
    in_features: int
    switches: Switches
    slots: dict[str, AdapterSlot] = dataclasses.field(default_factory=dict)
    transposed: bool = False
    """True if the module stores (I, O), as transformers' Conv1D does: the update applies to the transpose."""
    original: nn.Parameter | None = None
    """The base's own Parameter while `merged` is not empty, which makes unmerging bit-exact."""
    parked: dict[str, tuple[nn.Parameter, nn.Parameter]] = dataclasses.field(default_factory=dict)
    """Merged adapter -> its lambda and gamma, which are then not among the module's parameters."""
    kept: dict[str, Tensor] | None = None
    """The values, before merging, of the tensors that a parametrization computes the merged weight from."""
    written: bool = False
    """True if PEFT has merged its own adapters into the merged weight, or unmerged them."""
    stacks: Any = None
    """The adapters of the samples within `per_sample`: `randlora_vision.layers.mixed.Stacks`."""

    @property
    def mixture(self) -> Mixture | None:
        """The adapters of the samples, if adapters are in effect."""
        return self.switches.mixture if self.switches.enabled else None

    def pinned(self, names: list[str]) -> Plan:
        """The pinned orders of computation if the named adapters agree, otherwise none."""
        compute = self.slots[names[0]].compute
        for name in names[1:]:
            if self.slots[name].compute != compute:
                return ANY
        return PINNED[compute]

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged into the weight."""
        return tuple(name for name in self.switches.merged if name in self.slots)

    @property
    def is_folded(self) -> bool:
        """True if a parametrization is hidden by the merged weight, which it cannot compute."""
        return bool(self.merged) and self.original is None and self.kept is None

    def live(self) -> list[str]:
        """Names of the adapters that contribute to the effective weight."""
        return self.split(False, torch.compiler.is_dynamo_compiling())[0]

    def split(self, training: bool, compiling: bool) -> tuple[list[str], list[str]]:
        """The names of `live`, those without and those with dropout; the hot path asks for both in one call."""
        switches, slots = self.switches, self.slots
        kept: list[str] = []
        dropped: list[str] = []
        if switches.enabled and switches.call_scale != 0:
            for name in switches.active:
                # In compiled code, the scale is an input of the graph.
                if name in slots and name not in switches.merged and (compiling or slots[name].scale != 0):
                    (dropped if training and slots[name].dropout > 0 else kept).append(name)
        return kept, dropped
