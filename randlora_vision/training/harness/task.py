"""The interface between the training loop and a task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.data import DataLoader

HELD_OUT = "validation"
"""The kind of images on which a task measures that does not train on them."""


@runtime_checkable
class OwnBatches(Protocol):
    """The batches of one process, which are not distributed to others."""

    @property
    def layout(self) -> Mapping[str, Any]:
        """What their order depends on, besides the settings: checkpoints need the same."""

    def after(self, done: int) -> Iterable[Any]:
        """Return the batches that follow the first `done` of them."""


class Task(Protocol):
    """A training task: any object with these seven members."""

    @property
    def loss(self) -> nn.Module:
        """A module that holds the model and returns the mean loss (a scalar) of a batch; it may be a `JointLoss`."""

    @property
    def batches(self) -> DataLoader[Any] | OwnBatches:
        """As many batches as all processes together consume, in an order that depends only on the seed.

        Or the batches of this process alone.
        """

    @property
    def own_lr(self) -> Mapping[nn.Parameter, float]:
        """The peak learning rates of parameters for which it is not that of the options."""

    @property
    def measured(self) -> str:
        """The kind of images on which `evaluate` measures, for messages."""

    def evaluate(self) -> dict[str, float]:
        """Return the validation metrics by name."""

    def check_gradients(self) -> list[str]:
        """Check after the first backward pass: raise ValueError for a part that cannot learn, else return notes."""

    def save(self) -> str:
        """Write the trained parameters and return their path."""


@runtime_checkable
class JointLoss(Protocol):
    """A loss that is over several batches that of one big batch, not the mean of the batches' losses.

    Contrastive losses are an example: pairs of one batch are negatives for those of another.
    """

    def join(self, batches: Sequence[Any], seed: Callable[[int], None]) -> Sequence[Any]:
        """Return the arguments to call the loss with in place of the batches of one optimiser step.

        The mean of the resulting losses, and of their gradients, is that of the big batch. `seed(k)` sets the
        random states to those in effect when the loss is called with the k-th argument.
        """


@runtime_checkable
class BoundedLoss(Protocol):
    """A loss with trained parameters that have bounds, such as the logit scale of CLIP."""

    def clamp(self) -> None:
        """Move these parameters into their bounds; called after every step."""


@dataclass(frozen=True)
class Speed:
    """The number of steps, their duration without evaluation, and the memory that they used."""

    steps: int
    seconds: float
    images_per_second: float
    peak_memory: float  # GB, see `progress.peak_memory`
