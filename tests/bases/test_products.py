"""Products of an update that are computed in place where nothing records them."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.operations import Operations
from randlora_vision.bases.products import diagonal_gradients, scaled_a


def test_in_place_gives_the_same_bits_and_leaves_the_parameters_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, lam, gamma = (torch.randn(*size, generator=generator) for size in ((4, 12), (4, 3), (3, 12)))
    trained = nn.Parameter(lam.clone()), nn.Parameter(gamma.clone())
    recorded = scaled_a(a, *trained, torch.float32)
    d_recorded = diagonal_gradients(a, *trained, recorded.detach().clone(), private=False)
    with torch.no_grad(), Operations() as operations:
        plain = scaled_a(a, *trained, torch.float32)
        d_plain = diagonal_gradients(a, *trained, plain.clone(), private=True)
    assert operations.counts["mul_"] == 2 and operations.counts["mul"] == 1  # one new matrix, and not three
    assert torch.equal(plain, recorded) and torch.equal(trained[0], lam) and torch.equal(trained[1], gamma)
    torch.testing.assert_close(plain, torch.einsum("rn,rm,nm->rnm", lam, a, gamma).reshape(12, 12))
    assert all(map(torch.equal, d_plain, d_recorded))
