"""Denoisers that take turns, as in Wan 2.2: one for the noise levels from a boundary on, and one for those below."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

EXPERTS = ("high-noise", "low-noise")
"""In the order in which a pipeline uses them."""


def places_of_experts(timesteps: Tensor, boundary: float, chosen: Tensor, density: Tensor) -> Tensor:
    """Return places in a schedule (B,), each within the levels of an expert.

    Args:
        timesteps: All timesteps of the schedule, from noise on.
        boundary: The first timestep of the expert for high noise.
        chosen: The index of the expert (B,) in `EXPERTS`.
        density: Where each place is within the levels of its expert (B,), from 0 to 1.
    """
    high = int((timesteps >= boundary).sum())
    first, length = torch.tensor([0, high])[chosen], torch.tensor([high, len(timesteps) - high])[chosen]
    return first + torch.minimum((density * length).long(), length - 1)


def in_this_step(parts: Mapping[str, nn.Module]) -> list[str]:
    """Return the trained components except denoisers that had no items in a step, as another one has gradients."""
    denoisers = [name for name in parts if not name.startswith("text_encoder")]
    reached = {name for name in denoisers if any(p.grad is not None for p in parts[name].parameters())}
    return [name for name in parts if name in reached or name not in denoisers or not reached]
