"""The bases are bit-identical everywhere and in every version."""

from __future__ import annotations

import copy
import hashlib
import pickle
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from randlora_vision.bases import Bases, BasesSpec, generate, get_bases, hadamard, random
from randlora_vision.bases.dense import DenseBases, DenseTerm
from randlora_vision.bases.hadamard import grid
from randlora_vision.bases.stored import stored_bases

CPU = torch.device("cpu")
# Files refer to bases only by their seed. These digests must never change, or every saved adapter becomes invalid.
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


@pytest.mark.parametrize("kind", ["uniform", "normal", "very_sparse", "peft", "structured"])
def test_checksums_are_of_the_tensors(kind: str) -> None:
    bases = get_bases(spec(kind))
    data = bases._source(0).numpy().tobytes() + bases._source(1).numpy().tobytes()
    assert hashlib.sha256(data).hexdigest() == bases.sha256
    if kind == "structured":  # its products use the factors Q, the signs, right and left
        factors = (*hadamard.a_factors(0, 5, 33), *hadamard.b_factors(0, 70, 35))
        data = b"".join(factor.tobytes() for factor in factors)
    assert f"{zlib.crc32(data):08x}" == bases.crc32


def test_a_check_is_made_before_the_first_use_and_until_it_passes() -> None:
    bases, right = Bases.kinds["uniform"](spec(seed=91)), False
    calls: list[str] = []

    def check(bases: Bases) -> None:
        calls.append(bases.crc32)
        if not right:
            raise ValueError("others")

    owner = BasesSpec("", 0, 0, 0, 0, 0)
    bases.check_before_use(check, owner)
    assert bases.a(torch.device("meta"), torch.float32).is_meta and not calls and not bases.is_drawn
    uses: tuple[Callable[[], object], ...] = (
        lambda: bases.a(CPU, torch.float16),
        lambda: bases.term(torch.zeros(2, 2), torch.zeros(2, 4), 6, 1.0, torch.float32),
        lambda: bases.crc32,
    )
    for use in uses:
        with pytest.raises(ValueError, match="others"):
            use()
    right = True
    assert len(calls) == 3 and bases.b(CPU, torch.float32).shape == (70, 35) and len(set(calls)) == 1
    bases.a(CPU, torch.float64)
    assert len(calls) == 4
    right = False
    bases.check_before_use(check, owner)
    del owner  # such as the adapter that came from the wrong file
    bases.b(CPU, torch.float64)
    assert len(calls) == 4


def test_stored_bases_of_one_checksum_are_not_confused() -> None:
    """Adding a multiple of the polynomial leaves a CRC as it is; nobody meets this by accident."""
    a, b = torch.ones(1, 2), torch.ones(2, 2)
    polynomial = int(f"{0x104C11DB7:033b}"[::-1], 2)
    data = int.from_bytes(b.numpy().tobytes(), "little") ^ polynomial << 64
    other = torch.frombuffer(bytearray(data.to_bytes(16, "little")), dtype=torch.float32).reshape(2, 2)
    assert zlib.crc32(other.numpy().tobytes()) == zlib.crc32(b.numpy().tobytes()) and not torch.equal(other, b)
    one = stored_bases(a, b)
    assert stored_bases(a.clone(), b.clone()) is one
    with pytest.raises(ValueError, match=f"other stored bases of the same sizes and CRC-32 .{one.crc32}. are in use"):
        stored_bases(a, other)
    del one
    assert torch.equal(stored_bases(a, other).b(CPU, torch.float32), other)


def test_uniform_from_the_raw_stream() -> None:
    """An independent implementation of the definition, one number at a time in pure Python."""
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


@pytest.mark.parametrize("chunk", [1, 40, 2**17])
def test_rows_drawn_together_are_those_of_separate_streams(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "_CHUNK", chunk)
    for kind, draw, count in (("uniform", random.uniform, 7), ("normal", random.normal, 39)):
        rows = [draw(random.words(2**64 - 1, 1, row, count))[:13] for row in range(9)]
        np.testing.assert_array_equal(generate(kind, 2**64 - 1, 1, 9, 13, 0), np.stack(rows))
    empty = generate("uniform", 0, 1, 0, 13, 0)
    assert empty.shape == (0, 13)


def test_one_object_a_spec() -> None:
    bases = get_bases(spec(seed=11))
    assert get_bases(spec(seed=11)) is bases
    assert copy.deepcopy(bases) is bases
    assert pickle.loads(pickle.dumps(bases)) is bases
    assert len(pickle.dumps(bases)) < 500


def test_copies_by_device_and_dtype() -> None:
    bases = DenseBases(spec())
    single = bases.b(CPU, torch.float32)
    assert bases.b(CPU, torch.float32) is single
    assert torch.equal(bases.b(CPU, torch.bfloat16), single.bfloat16())
    assert torch.equal(bases.a(CPU, torch.float64).float(), bases.a(CPU, torch.float32))
    assert bases.b(torch.device("meta"), torch.float32).is_meta
    assert bases.nbytes == 4 * (5 * 33 + 70 * 35)


def test_usable_by_autograd_when_first_made_in_inference_mode() -> None:
    bases = DenseBases(spec())
    with torch.inference_mode():
        bases.b(CPU, torch.float32)
    x = torch.randn(2, 70, requires_grad=True)
    (x @ bases.b(CPU, torch.float32)).sum().backward()
    assert x.grad is not None


# Structured bases: signs from small Hadamard matrices.


def parity_hadamard(rows: list[int], columns: list[int]) -> np.ndarray:
    """Entries of Sylvester's matrix by its definition, one at a time."""
    return np.array([[(-1) ** bin(r & c).count("1") for c in columns] for r in rows])


def test_structured_from_the_raw_stream() -> None:
    """An independent implementation of the definition: every entry from its indices, in pure Python."""
    seed, wide, rank, narrow = 9, 23, 3, 7
    bases = -(-narrow // rank)
    columns = rank * bases

    def stream(matrix: int, row: int, count: int) -> list[int]:
        return np.random.Philox(key=seed, counter=[0, 0, row, matrix]).random_raw(count).tolist()

    def sign(word: int) -> int:
        return 1 if word >= 2**63 else -1

    def hadamard(matrix: int, row: int, rows: int, columns: int) -> np.ndarray:
        order = 2 ** max(rows - 1, columns - 1).bit_length()
        raw = stream(matrix, row, 3 * order)
        first, second = (sorted(range(order), key=part.__getitem__) for part in (raw[:order], raw[order : 2 * order]))
        flips = [sign(word) for word in raw[2 * order : 2 * order + rows]]
        return np.array(flips)[:, None] * parity_hadamard(first[:rows], second[:columns])

    b, inner, outer = grid(wide, columns)
    core, between = hadamard(1, 1, b, b), stream(1, 0, inner * b)
    draws = (hadamard(1, row, outer, inner) for row in range(2, 100))
    left = next(x for x in draws if all(np.linalg.matrix_rank(y) == min(y.shape) for y in (x, x[:-1])))
    big_b = generate("structured", seed, 1, wide, columns, 0)
    rows = [(q, p) for q in range(b) for p in range(outer) if p < outer - 1 or q < wide - b * (outer - 1)]
    for i, (q, p) in enumerate(rows):
        for f in range(columns):
            n, k = divmod(f, b)
            assert big_b[i, f] == left[p, n] * sign(between[n * b + q]) * core[q, k]
    projection, own = hadamard(0, 1, rank, 4), stream(0, 0, narrow)
    big_a = generate("structured", seed, 0, rank, narrow, 0)
    for k in range(rank):
        for j in range(narrow):
            assert big_a[k, j] == projection[k, j // 2] * sign(own[j])


def test_structured_digest_is_pinned() -> None:
    assert get_bases(spec("structured")).sha256 == "a53772343b06997e3f0ede5524c823a226e3b83ab168f28c5cf6d8054c30600c"


@pytest.mark.parametrize(("wide", "columns"), [(3072, 768), (768, 768), (131, 127), (7, 8), (1, 1), (12288, 3072)])
def test_structured_factors_are_small(wide: int, columns: int) -> None:
    b, inner, outer = grid(wide, columns)
    assert b * outer >= wide and b * inner >= columns
    applied = b * inner * (b + outer)
    assert applied <= 4 * wide * columns**0.5 + 16  # against wide * columns for a matrix


def test_structured_matrices_are_orthogonal_and_span_everything() -> None:
    b = generate("structured", 0, 1, 64, 16, 0).astype(np.float64)
    assert np.array_equal(b.T @ b, 64 * np.eye(16))
    assert np.array_equal(np.unique(b), [-1, 1])
    for wide, narrow, rank in ((96, 48, 6), (37, 37, 5), (64, 64, 64), (16, 16, 1), (131, 127, 9), (768, 768, 32)):
        bases = -(-narrow // rank)
        generator = np.random.default_rng(0)
        lam, gamma = generator.normal(size=(rank, bases)), generator.normal(size=(bases, narrow))
        a = generate("structured", 0, 0, rank, narrow, 0)
        af = (lam[:, :, None] * a[:, None, :] * gamma[None]).reshape(-1, narrow)
        update = generate("structured", 0, 1, wide, rank * bases, 0) @ af
        assert np.linalg.matrix_rank(update) == narrow


def test_structured_factors_are_kept_once_and_are_few() -> None:
    bases = get_bases(spec("structured", rank=32, narrow=768, wide=3072, columns=768))
    lam, gamma = torch.zeros(32, 24), torch.zeros(24, 768)
    first, second = (bases.term(lam, gamma, 3072, 1.0, torch.bfloat16) for _ in range(2))
    held = [tensor for tensor in first if isinstance(tensor, torch.Tensor)][:4]
    assert all(x is y for x, y in zip(first[:4], second[:4], strict=True))
    assert all(tensor.dtype == torch.bfloat16 for tensor in held)
    assert sum(tensor.nbytes for tensor in held) == bases.bytes_in(torch.bfloat16) < 200_000
    with torch.inference_mode():
        made = bases.term(lam, gamma, 1536, 1.0, torch.float32)
    assert not made[0].is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
def test_ternary_bases_are_held_as_int8_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    bases = get_bases(spec(kind))
    written_out = torch.from_numpy(generate(kind, 0, 1, 70, 35, 33)).to(dtype)
    assert torch.equal(bases.b(CPU, dtype), written_out)
    lam, gamma = torch.zeros(5, 7), torch.zeros(7, 33)
    term = bases.term(lam, gamma, 66, 1.0, dtype)
    assert isinstance(term, DenseTerm)
    assert term.b.dtype == torch.int8 and term.product_dtype == dtype
    assert torch.equal(term.b_as(dtype), written_out[:66])
    assert term.b.untyped_storage().data_ptr() == bases.term(lam, gamma, 70, 1.0, dtype).b.untyped_storage().data_ptr()
    assert bases.nbytes == 4 * 5 * 33 + 70 * 35
    held = [tensor for kept in bases._tensors.values() for tensor in kept if tensor.numel() >= 66 * 35]
    assert held and all(tensor.dtype == torch.int8 for tensor in held)


@pytest.mark.parametrize("kind", ["uniform", "sparse", "peft", "structured"])
def test_the_checksum_keeps_nothing_that_is_not_needed(kind: str) -> None:
    """Bases that are used in half precision hold no float32 copy after their checksum; unused ones do until then."""
    bases = Bases.kinds[kind](spec(kind, 5))
    lam, gamma = torch.zeros(2, 2), torch.zeros(2, 4)
    bases.term(lam, gamma, 6, 1.0, torch.bfloat16)
    assert bases.sha256 and bases.crc32 and not bases._drawn
    fresh = Bases.kinds[kind](spec(kind, 5))
    assert (fresh.sha256, fresh.crc32) == (bases.sha256, bases.crc32) and len(fresh._drawn) == (
        0 if kind == "structured" else 2
    )
    fresh.term(lam, gamma, 6, 1.0, torch.bfloat16)
    assert not fresh._drawn
