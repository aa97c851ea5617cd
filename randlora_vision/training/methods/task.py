"""The task of every script: what a method adapts, with its loss, its data and its file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.training.harness.task import HELD_OUT, OwnBatches
from randlora_vision.training.methods.adaptation import Adaptation


@dataclass(frozen=True)
class AdaptedTask:
    """A `harness.task.Task` that checks a method's gradients and writes its file."""

    adaptation: Adaptation
    loss: nn.Module
    batches: DataLoader[Any] | OwnBatches
    evaluate: Callable[[], dict[str, float]]
    own_lr: Mapping[nn.Parameter, float]
    path: Path | None
    """The file; None for a process that must not write."""
    measured: str = HELD_OUT
    """The kind of images on which `evaluate` measures, for messages."""

    def check_gradients(self) -> list[str]:
        """Run the method's check."""
        return self.adaptation.check_gradients()

    def save(self) -> str:
        """Write the trained parameters."""
        if self.path is not None:
            self.adaptation.save(self.path)
        return str(self.path)
