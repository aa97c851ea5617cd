"""The rank of the update for every kind of bases at every rank, and the paper's start and scale in a whole layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.bases import generate
from tests.helpers import dense_delta

NARROW = 16


@pytest.mark.parametrize("shape", [(NARROW, NARROW), (40, NARROW), (NARROW, 23)])
@pytest.mark.parametrize("kind", ["uniform", "normal", "structured"])
def test_the_update_has_full_rank_at_every_rank(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in range(1, NARROW + 1):
        bases = -(-NARROW // rank)
        lam, gamma = (torch.randn(size, generator=generator) for size in ((rank, bases), (bases, NARROW)))
        delta = dense_delta(lam, gamma, shape, 1.0, kind, 5, NARROW)
        assert np.linalg.matrix_rank(delta.numpy()) == NARROW, (kind, rank)


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
def test_ternary_bases_reach_the_columns_in_which_a_is_not_all_zero(kind: str) -> None:
    """No base reaches the others: at a small rank, or with few entries in a large matrix, there are many of them."""
    generator = torch.Generator().manual_seed(0)
    ranks = []
    for rank in range(1, NARROW + 1):
        bases = -(-NARROW // rank)
        lam, gamma = (torch.randn(size, generator=generator) for size in ((rank, bases), (bases, NARROW)))
        delta = dense_delta(lam, gamma, (256, NARROW), 1.0, kind, 5, NARROW)
        reached = generate(kind, 5, 0, rank, NARROW, NARROW).any(axis=0)
        assert np.array_equal(delta.any(dim=0).numpy(), reached)
        ranks.append(np.linalg.matrix_rank(delta.numpy()))
        assert ranks[-1] == min(reached.sum(), rank * bases), (kind, rank)
    assert ranks[0] < NARROW // 2 < ranks[-1]


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 12), (12, 12)])
def test_the_papers_start_and_scale(inputs: int, outputs: int) -> None:
    """lambda 1 / max(N, r), gamma zero, scale 1 / r, and x A' B' added to the layer's own output."""
    rank = 5
    bases = -(-min(inputs, outputs) // rank)
    layer = nn.Sequential(nn.Linear(inputs, outputs)).double()
    plain = nn.Linear(inputs, outputs).double()
    plain.load_state_dict(layer[0].state_dict())
    inject(
        layer, RandLoRAConfig(rank=rank, alpha=1.0, init="gamma-zero", target_modules=["0"], bases="uniform", seed=3)
    )
    lam, gamma = layer[0].adapter_tensors("weight", "default")
    torch.testing.assert_close(lam, torch.full_like(lam, 1 / max(rank, bases)))
    assert lam.shape == (rank, bases) and gamma.shape == (bases, min(inputs, outputs)) and not gamma.any()
    x = torch.randn(7, inputs, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    nn.init.normal_(gamma)
    wide, narrow = max(inputs, outputs), min(inputs, outputs)
    a = torch.from_numpy(generate("uniform", 3, 0, rank, narrow, narrow)).double()
    b = torch.from_numpy(generate("uniform", 3, 1, wide, rank * bases, narrow)).double()
    update = torch.zeros(wide, narrow, dtype=torch.float64)
    for n in range(bases):
        update += b[:, n::bases] @ ((lam.double()[:, n, None] * a) * gamma.double()[n])
    update = update if outputs >= inputs else update.T
    torch.testing.assert_close(layer(x), plain(x) + (x @ update.T) / rank)
