"""NoLA (arXiv 2310.02556): LoRA whose two factors are trained combinations of frozen random matrices.

PEFT has no NoLA. One bank of random matrices serves all layers, cut to the size of each.

Shapes: O out, I in, R rank, K matrices in a bank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_RANK = 8


class Combined(nn.Module):
    """Parametrization W -> W + B A, with A = sum_k a_k A_k (R, I) and B = sum_k b_k B_k (O, R); b starts at zero."""

    def __init__(self, weight: Tensor, bank: Tensor) -> None:
        super().__init__()
        number, rank, _ = bank.shape
        self.bank = (bank,)  # in a tuple: neither a buffer, nor copied once per layer
        self.a = nn.Parameter(torch.randn(number) / math.sqrt(number))
        self.b = nn.Parameter(torch.zeros(number))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective weight (O, I)."""
        (bank,) = self.bank
        out, inputs = weight.shape
        number = len(bank)
        down = torch.einsum("k,kri->ri", self.a, bank[:, :, :inputs]) / math.sqrt(inputs)
        up = torch.einsum("k,kro->or", self.b, bank[:, :, :out]) / math.sqrt(number)
        return weight + up @ down


def inject_nola(model: nn.Module, targets: Sequence[str], number: int) -> nn.Module:
    """Freeze the model and add NoLA with banks of `number` matrices to the named linear layers; return the model."""
    model.requires_grad_(False)
    layers = [model.get_submodule(target) for target in targets]
    rank = min(_RANK, *(min(layer.weight.shape) for layer in layers))
    wide = max(max(layer.weight.shape) for layer in layers)
    bank = torch.randn(number, rank, wide)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Combined(layer.weight, bank))
    return model
