"""Random numbers of a batch that depend on its samples alone, not on the batch or the process that they are in.

So training comes out the same for every number of processes, accumulation steps and images per forward call that make
up the same optimiser step. The generators are on the CPU: numbers do not depend on the device either.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Noise:
    """The random numbers of B samples: each drawn from a generator of its own, or all from PyTorch's."""

    def __init__(self, count: int, seeds: Sequence[int] | None = None) -> None:
        self.count = count
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return standard normal numbers (B, *shape), float32."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((self.count, *shape), self.generators, device, torch.float32)

    def each(self, draw: Callable[[int, torch.Generator | None], Tensor]) -> Tensor:
        """Return `draw(count, generator)`, a vector of `count` numbers, for all samples together (B,), on the CPU."""
        if self.generators is None:
            return draw(self.count, None)
        return torch.cat([draw(1, generator) for generator in self.generators])
