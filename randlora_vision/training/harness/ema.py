"""Exponential moving averages of the trained parameters.

By hand, because the averages of PyTorch and timm copy the whole model, whose frozen weights are most of it, and those
of diffusers copy every parameter to the CPU and back at each evaluation.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The averages, by name; `applied` loads them into the model temporarily.

    average <- d * average + (1 - d) * parameter after every step t, with d = min(decay, (1 + t) / (10 + t)).
    The smaller decay of the first steps keeps the initial values from dominating the average in a short run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the parameters after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Load the averages into the model for the duration of the block."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.put_into_model()
        try:
            yield
        finally:
            _copy(trained, self.parameters)

    def put_into_model(self) -> None:
        """Load the averages into the model permanently."""
        _copy(self.averages, self.parameters)

    def take_from_model(self) -> None:
        """Replace the averages by the parameters, which hold averages saved earlier."""
        _copy(self.parameters, self.averages)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
