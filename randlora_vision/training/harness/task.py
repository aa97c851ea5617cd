"""What the training loop asks of a task, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.training.harness.options import TrainingOptions
from randlora_vision.training.methods.adaptation import Adaptation


class Task(Protocol):
    """What is trained: any object with these five."""

    @property
    def loss(self) -> nn.Module:
        """A module that holds the model; called with a batch it returns the mean loss, a scalar."""

    @property
    def batches(self) -> DataLoader[Any]:
        """As many batches as all processes together consume, in an order that depends on nothing but a seed."""

    def evaluate(self) -> dict[str, float]:
        """Return what is measured during training, by name."""

    def check_gradients(self) -> list[str]:
        """After the first backward: raise ValueError for a part that cannot learn; return notes."""

    def save(self) -> str:
        """Write what is trained and return where."""


@runtime_checkable
class JointTask(Protocol):
    """A task whose loss of several batches is that of one big batch, not the mean of the batches' losses.

    Contrastive ones are: pairs of one batch are negatives of those of another.
    """

    def join(self, batches: Sequence[Any], seed: Callable[[int], None]) -> Sequence[Any]:
        """Return, for the batches of one optimiser step, what `loss` is called with in place of each.

        The mean of what it then returns, and of the gradients, is the big batch's. `seed(k)` puts the
        random states where they are when `loss` is called with the k-th.
        """


class AdaptedTask:
    """What the tasks of the scripts share: a method's gradients are checked, and its file is written."""

    def __init__(self, adaptation: Adaptation, path: Path | None) -> None:
        """Save to `path`, on the process that has one."""
        self.adaptation = adaptation
        self.path = path

    def check_gradients(self) -> list[str]:
        """Leave it to the method."""
        return self.adaptation.check_gradients()

    def save(self) -> str:
        """Write what was trained."""
        if self.path is not None:
            self.adaptation.save(self.path)
        return str(self.path)


def batches_consumed(training: TrainingOptions, processes: int) -> int:
    """Return how many batches all processes together take from the loader."""
    assert training.steps is not None, "resolve the options first"
    return training.steps * training.gradient_accumulation_steps * processes


@dataclass(frozen=True)
class Speed:
    """How many steps were made, how long they took, evaluation left out, and the memory they needed."""

    steps: int
    seconds: float
    images_per_second: float
    peak_memory: float  # GB, see `progress.peak_memory`
