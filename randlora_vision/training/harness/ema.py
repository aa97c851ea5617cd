"""Exponential moving averages of the trained parameters, and of nothing else."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The averages, by name; `applied` lends them to the model.

    average <- d * average + (1 - d) * parameter after every step, with d = min(decay, (1 + t) / (10 + t)) at
    the t-th: in a short run the first steps, near the start, would otherwise weigh for too long.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages for the length of the block."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.put_into_model()
        try:
            yield
        finally:
            _copy(trained, self.parameters)

    def put_into_model(self) -> None:
        """Give the model the averages for good."""
        _copy(self.averages, self.parameters)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from averages saved earlier."""
        _copy(averages, self.averages)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
