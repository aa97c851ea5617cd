"""The interface between the training loop and a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.training.harness.options import TrainingOptions
from randlora_vision.training.methods.adaptation import Adaptation


class Task(Protocol):
    """A training task: any object with these five members."""

    @property
    def loss(self) -> nn.Module:
        """A module that holds the model and returns the mean loss (a scalar) of a batch."""

    @property
    def batches(self) -> DataLoader[Any]:
        """As many batches as all processes together consume, in an order that depends only on the seed."""

    def evaluate(self) -> dict[str, float]:
        """Return the validation metrics by name."""

    def check_gradients(self) -> list[str]:
        """Check after the first backward pass: raise ValueError for a part that cannot learn, else return notes."""

    def save(self) -> str:
        """Write the trained parameters and return their path."""


@runtime_checkable
class JointTask(Protocol):
    """A task whose loss over several batches is that of one big batch, not the mean of the batches' losses.

    Contrastive losses are an example: pairs of one batch are negatives for those of another.
    """

    def join(self, batches: Sequence[Any], seed: Callable[[int], None]) -> Sequence[Any]:
        """Return the arguments to call `loss` with in place of the batches of one optimiser step.

        The mean of the resulting losses, and of their gradients, is that of the big batch. `seed(k)` sets the
        random states to those in effect when `loss` is called with the k-th argument.
        """


class AdaptedTask:
    """Base class of the scripts' tasks: checks a method's gradients and writes its file."""

    measured = "validation"

    def __init__(self, adaptation: Adaptation, path: Path | None) -> None:
        """Save to `path`; processes that must not write pass None."""
        self.adaptation = adaptation
        self.path = path

    def check_gradients(self) -> list[str]:
        """Run the method's check."""
        return self.adaptation.check_gradients()

    def save(self) -> str:
        """Write the trained parameters."""
        if self.path is not None:
            self.adaptation.save(self.path)
        return str(self.path)


def batches_consumed(training: TrainingOptions, processes: int) -> int:
    """Return how many batches all processes together take from the loader."""
    assert training.steps is not None, "resolve the options first"
    return training.steps * training.gradient_accumulation_steps * processes


@dataclass(frozen=True)
class Speed:
    """The number of steps, their duration without evaluation, and the memory that they used."""

    steps: int
    seconds: float
    images_per_second: float
    peak_memory: float  # GB, see `progress.peak_memory`
