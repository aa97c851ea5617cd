"""The bases are the same bits everywhere, for ever."""

from __future__ import annotations

import copy
import hashlib
import pickle

import numpy as np
import pytest
import torch

from randlora_vision.bases import Bases, BasesSpec, generate, get_bases

CPU = torch.device("cpu")
# Files refer to bases by their seed alone. These digests must never change: a change makes every saved adapter void.
PINNED = {
    ("uniform", 0): "f32f0ba05b6ca7e5e142439fed1b5866d8bc242e4c12bbb9ce44cbff6550ab2e",
    ("uniform", 2**64 - 1): "f2712854a7087fb06ddf158cd045ed69fa4f153bcc1c68edeb18d89af156fdd7",
    ("normal", 0): "e9cb1015ca7698f606187fc559b935c1df984f7571be5fe95bbf4ab60e27aa87",
    ("sparse", 0): "8146cf607499880b5b807f42435e736680332c08a05b7158b633fbbd6e77a6d1",
    ("very_sparse", 0): "47444927d5763d25e76c073b7e30cd536ccf1fe4826170a487b71be8d4bc43d5",
}


def spec(kind: str = "uniform", seed: int = 0, **sizes: int) -> BasesSpec:
    return BasesSpec(kind, seed, **{"rank": 5, "narrow": 33, "wide": 70, "columns": 35, **sizes})


@pytest.mark.parametrize(("kind", "seed"), PINNED)
def test_pinned_digests(kind: str, seed: int) -> None:
    assert get_bases(spec(kind, seed)).sha256 == PINNED[kind, seed]


def test_digest_is_of_the_tensors() -> None:
    bases = get_bases(spec())
    data = bases.a(CPU, torch.float32).numpy().tobytes() + bases.b(CPU, torch.float32).numpy().tobytes()
    assert hashlib.sha256(data).hexdigest() == bases.sha256


def test_uniform_from_the_raw_stream() -> None:
    """An independent reading of the definition, one number at a time in Python's own arithmetic."""
    row = generate("uniform", 7, 1, 3, 5, 5)[2]
    raw = np.random.Philox(key=7, counter=[0, 0, 2, 1]).random_raw(3)
    halves = [part for word in raw.tolist() for part in (word & 0xFFFFFFFF, word >> 32)][:5]
    scale = np.float32(3**0.5 / 2**24)
    assert row.tolist() == [float(np.float32(2 * (half >> 8) + 1 - 2**24) * scale) for half in halves]


@pytest.mark.parametrize("kind", ["uniform", "normal", "sparse", "very_sparse"])
def test_slices_do_not_depend_on_the_size(kind: str) -> None:
    large = generate(kind, 3, 1, 40, 90, 64)
    assert np.array_equal(large[:7, :31], generate(kind, 3, 1, 7, 31, 64))


@pytest.mark.parametrize(
    ("kind", "fourth"), [("uniform", 1.8), ("normal", 2.9), ("sparse", 3.0), ("very_sparse", 16.0)]
)
def test_moments(kind: str, fourth: float) -> None:
    sample = generate(kind, 0, 1, 1024, 512, 256).astype(np.float64)
    assert abs(sample.mean()) < 5e-3
    assert abs(sample.var() - 1) < 1e-2
    assert abs((sample**4).mean() / fourth - 1) < 3e-2


def test_ternary_probabilities() -> None:
    sparse = generate("sparse", 0, 0, 512, 512, 256)
    values, counts = np.unique(sparse, return_counts=True)
    assert values.tolist() == [-np.float32(3**0.5), 0, np.float32(3**0.5)]
    assert np.allclose(counts / sparse.size, [1 / 6, 2 / 3, 1 / 6], atol=3e-3)
    very = generate("very_sparse", 0, 0, 512, 512, 256)
    assert abs((very != 0).mean() - 1 / 16) < 2e-3


def test_matrices_and_seeds_are_unrelated() -> None:
    streams = [generate("uniform", seed, matrix, 1, 4096, 1)[0] for seed in (0, 1) for matrix in (0, 1)]
    correlations = np.corrcoef(streams) - np.eye(4)
    assert np.abs(correlations).max() < 0.06


def test_one_object_a_spec() -> None:
    bases = get_bases(spec(seed=11))
    assert get_bases(spec(seed=11)) is bases
    assert copy.deepcopy(bases) is bases
    assert pickle.loads(pickle.dumps(bases)) is bases
    assert len(pickle.dumps(bases)) < 500


def test_copies_by_device_and_dtype() -> None:
    bases = Bases(spec())
    single = bases.b(CPU, torch.float32)
    assert bases.b(CPU, torch.float32) is single
    assert torch.equal(bases.b(CPU, torch.bfloat16), single.bfloat16())
    assert torch.equal(bases.a(CPU, torch.float64).float(), bases.a(CPU, torch.float32))
    assert bases.b(torch.device("meta"), torch.float32).is_meta
    assert bases.nbytes == 4 * (5 * 33 + 70 * 35)


def test_usable_by_autograd_when_first_made_in_inference_mode() -> None:
    bases = Bases(spec())
    with torch.inference_mode():
        bases.b(CPU, torch.float32)
    x = torch.randn(2, 70, requires_grad=True)
    (x @ bases.b(CPU, torch.float32)).sum().backward()
    assert x.grad is not None
