"""Malicious files: no code in them runs, nothing large is allocated or written, and the error is one line."""

from __future__ import annotations

import base64
import gc
import json
import pickle
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter
from randlora_vision.bases import BasesSpec, get_bases
from randlora_vision.bases.stored import stored_bases
from randlora_vision.injection.inject import add_adapter
from randlora_vision.injection.plan import make_plan
from randlora_vision.layers.adapted import adapted_modules
from tests.adapter_files import Tamper, edit, rewritten
from tests.helpers import mlp, randomize, snapshot

CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"], modules_to_save=["2.bias"])
LISTED = [["0", 16, 8, 2, 40.0], ["2", 6, 16, 2, 40.0]]
X = torch.linspace(-2, 2, 24).reshape(3, 8)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    model = mlp()
    inject(model, CONFIG)
    randomize(model)
    return save_adapter(model, tmp_path / "adapter.safetensors")


def refuse(path: Path, message: str) -> None:
    """The error is one line that names the file, the model is unchanged, and little memory was used."""
    model = mlp()
    before = snapshot(model)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(model, path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 2000
    assert snapshot(model) == before


# Pickles.


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


WRITERS: dict[str, Callable[[object, Path], object]] = {
    "torch": torch.save,
    "torch, old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    **{f"protocol {i}": lambda v, p, i=i: p.write_bytes(pickle.dumps(v, protocol=i)) for i in range(2, 6)},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".BIN"])
def test_a_pickle_is_never_opened(tmp_path: Path, writer: str, suffix: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"adapter{suffix}"
    WRITERS[writer](Bomb(trace), path)
    refuse(path, "is a pickle: opening one runs the code in it.*convert it yourself")
    assert not trace.exists()
    with path.open("rb") as file, file if writer.startswith("protocol") else open(path, "rb") as raw:
        if writer.startswith("protocol"):  # unpickling it does run the code
            pickle.load(raw).close()
            assert trace.exists()


def test_a_header_that_starts_like_a_pickle_is_none(good: Path) -> None:
    """A header of 640 bytes: its length begins with the two bytes of a pickle's second protocol."""
    data = good.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for wanted in (0x280, 0x380, 0x480, 0x580):
        if wanted >= size:
            good.write_bytes(struct.pack("<Q", wanted) + data[8 : 8 + size].ljust(wanted) + data[8 + size :])
            load_adapter(mlp(), good)
            return
    raise AssertionError("the header has outgrown the test")


# The container.


def container(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CONTAINERS: dict[str, bytes] = {
    "nothing": b"",
    "eight bytes": b"\0" * 8,
    "length of 2**63": container(b"{}", size=2**63),
    "length of 10**12": container(b"{}", size=10**12),
    "longer than the file": container(b"{}" + b" " * 40, size=43),
    "no json": container(b"{" * 64),
    "deep json": container(b'{"a":' * 100_000),
    "a trillion numbers": container({"lambda": tensor([10**12], 4 * 10**12)}),
    "a trillion in 4 bytes": container({"lambda": tensor([10**6, 10**6], 4)}, b"\0" * 4),
    "overflowing shape": container({"lambda": tensor([2**32, 2**32, 2**32], 4)}, b"\0" * 4),
    "negative shape": container({"lambda": tensor([-1], 4)}, b"\0" * 4),
    "overlapping": container({"a": tensor([1], 4), "b": tensor([1], 4)}, b"\0" * 8),
    "beyond the end": container({"a": tensor([2], 8)}, b"\0" * 4),
    "backwards": container({"a": tensor([1], 0, start=4)}, b"\0" * 4),
    "twice the name": container(b'{"a":%b,"a":%b}' % ((json.dumps(tensor([1], 4)).encode(),) * 2), b"\0" * 4),
    "unknown dtype": container({"a": tensor([1], 4, "O32")}, b"\0" * 4),
    "metadata no strings": container({"__metadata__": {"format": 1}}),
    "a zip": b"PK\x05\x06" + b"\0" * 18,
    "a script": b"#!/bin/sh\nrm -rf /\n",
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_that_lies(tmp_path: Path, case: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(CONTAINERS[case])
    refuse(path, "not a readable safetensors file|not a RandLoRA adapter file")


def test_an_oversized_header(tmp_path: Path) -> None:
    """A header of 64 MiB in a sparse file is refused without parsing it."""
    path = tmp_path / "adapter.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 64 * 2**20) + b"{")
        file.truncate(2**27)
    refuse(path, "header of 67,108,864 bytes is too large")


def test_every_flipped_bit_and_every_cut_is_noticed(good: Path) -> None:
    data, choice, fresh = good.read_bytes(), random.Random(0), mlp()
    before = snapshot(fresh)
    for _ in range(60):
        position = choice.randrange(len(data))
        flipped = bytearray(data)
        flipped[position] ^= 1 << choice.randrange(8)
        if json_equal(data, bytes(flipped)):
            continue
        for damaged in (bytes(flipped), data[:position]):
            good.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                load_adapter(fresh, good)
            assert str(good) in str(caught.value)
    assert snapshot(fresh) == before


def json_equal(one: bytes, other: bytes) -> bool:
    """True if only white space in the header differs, such as a tab instead of a space."""
    try:
        end = 8 + int.from_bytes(one[:8], "little")
        return one[:8] == other[:8] and one[end:] == other[end:] and json.loads(one[8:end]) == json.loads(other[8:end])
    except ValueError:
        return False


# The content: well-formed files whose checksum is right.

LAMBDA, GAMMA = "lambda.2x4.8", "gamma.2x4.8"


def targets(text: str) -> Tamper:
    return lambda metadata, _: metadata.update(targets=base64.b64encode(zlib.compress(text.encode(), 9)).decode())


def listed(*changes: object) -> Tamper:
    """Replace the first entries of the first target."""
    return targets(json.dumps([[*changes, *LISTED[0][len(changes) :]], LISTED[1]]))


def both(*tampers: Tamper) -> Tamper:
    return lambda metadata, tensors: [tamper(metadata, tensors) for tamper in tampers]


def fill(name: str, value: float) -> Tamper:
    return lambda _, tensors: tensors[name].view(-1)[-1:].fill_(value)


def cast(name: str, dtype: torch.dtype) -> Tamper:
    return lambda _, tensors: tensors.update({name: tensors[name].to(dtype)})


def bomb(metadata: dict[str, str], _: dict[str, Tensor]) -> None:
    """60 MiB of brackets in a few KiB."""
    pack = zlib.compressobj(9)
    data = pack.compress(b"[") + b"".join(pack.compress(b"[]," * 2**20) for _ in range(20)) + pack.flush()
    assert len(data) < 2**19
    metadata["targets"] = base64.b64encode(data).decode()


def absurd_rank(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    listed("0", 16, 8, 10**12)(metadata, tensors)
    edit("config", rank=10**12, alpha=40, rank_pattern={"2": 2})(metadata, tensors)
    tensors[f"lambda.{10**12}x1.8"] = tensors.pop(LAMBDA)
    tensors[f"gamma.{10**12}x1.8"] = tensors.pop(GAMMA)


def only_sha256(metadata: dict[str, str], _: dict[str, Tensor]) -> None:
    spec = json.loads(metadata["bases"])
    del spec["crc32"]
    metadata["bases"] = json.dumps({**spec, "sha256": get_bases(BasesSpec(**spec)).sha256})


def padded(part: bytes) -> Tamper:
    """Bytes after the compressed list, or a list that is cut off."""

    def change(metadata: dict[str, str], _: dict[str, Tensor]) -> None:
        data = base64.b64decode(metadata["targets"])
        metadata["targets"] = base64.b64encode(data + part if part else data[:-1]).decode()

    return change


CONTENTS: dict[str, tuple[Tamper, str]] = {
    "bytes after the list": (padded(b"\0"), "1 bytes follow the compressed list"),
    "a second list after the list": (padded(zlib.compress(b"[]")), "bytes follow the compressed list"),
    "a list without its end": (padded(b""), "is cut off"),
    "a rank of 2.5": (listed("0", 16, 8, 2.5), "a size or rank must be an integer, got a number"),
    "a rank of true": (listed("0", 16, 8, True), "a size or rank must be an integer, got true or false"),
    "a size as text": (listed("0", "16"), "a size or rank must be an integer, got a string"),
    "a name that is a number": (listed(0), "a name must be a string, got an integer"),
    "four values": (targets(json.dumps([LISTED[0][:4], LISTED[1]])), "has 4 values"),
    "no targets": (targets("[]"), "the list is empty"),
    "a CRC-32 that is a number": (edit("bases", crc32=5), "bases: crc32 must be a string, got an integer"),
    "a CRC-32 of no digits": (edit("bases", crc32="0x00ab12"), "bases: crc32 must be 8 hexadecimal digits, got '0x00"),
    "a CRC-32 that is too long": (edit("bases", crc32="0" * 10**5), "bases: crc32 must be 8 hexadecimal digits"),
    "a SHA-256 beside the CRC-32": (edit("bases", sha256="0" * 64), "bases: unknown key 'sha256'"),
    "a SHA-256 in place of the CRC-32": (only_sha256, "bases: it lacks crc32"),
    "a kind that is a list": (edit("bases", kind=[]), "bases: kind must be a string, got a list"),
    "a fractional size": (edit("bases", wide=16.0), "bases: wide must be an integer, got a number"),
    "an unknown key of the bases": (edit("bases", x=1), "bases: unknown key 'x'"),
    "another seed": (edit("config", seed=1), "seed 1, but the file's are of kind 'structured' and seed 0"),
    "another alpha": (edit("config", alpha=3), "rank 2 and alpha 40, which the config does not give"),
    "a name of a million characters": (listed("a" * 10**6), "are not in the model"),
    "names of control characters": (listed("\x1b[31m\u202e\n"), r"\\x1b\[31m\\u202e\\n"),
    "a tensor with a name that shouts": (lambda _, t: t.update({"\x1b[1m" * 9999: torch.zeros(1)}), "unexpected"),
    "a bomb": (bomb, "malformed metadata"),
    "a config of patterns": (
        edit("config", rank_pattern={f"layer{i}": 1 for i in range(10**5)}),
        "malformed metadata.*characters",
    ),
    "a trillion rows": (listed("0", 10**12, 8), "its bases are .*, but its targets need .*'wide': 1000000000000"),
    "a trillion by a trillion": (listed("0", 10**12, 10**12), "does not hold the tensors that it lists"),
    "rank of a trillion": (absurd_rank, "shapes"),
    "rank of a trillion, bare": (edit("config", rank=10**12), "rank 2 and alpha 40, which the config"),
    "bases of a trillion": (edit("bases", wide=10**12, columns=10**12), "its bases are"),
    "a number beyond floats": (targets(f"[[{'9' * 400}, 1e400, 8, 2, 40.0]]"), "malformed metadata"),
    "a number of 5000 digits": (targets(f"[[\"0\", {'9' * 5000}, 8, 2, 40.0]]"), "malformed metadata"),
    "alpha of infinity": (listed("0", 16, 8, 2, float("inf")), "alpha must be a positive number"),
    "alpha of NaN": (listed("0", 16, 8, 2, float("nan")), "alpha must be a positive number"),
    "config of infinity": (edit("config", alpha=float("inf")), "alpha must be a positive number"),
    "a target twice": (targets(json.dumps([LISTED[0], *LISTED])), "listed twice"),
    "a target outside": (listed("../../etc/passwd"), "not in the model"),
    "a root target": (listed("/etc/passwd"), "not in the model"),
    "a target of the class": (listed("__class__"), "not in the model"),
    "a tensor outside": (
        lambda _, tensors: tensors.update({"saved.../../etc/passwd": torch.zeros(1)}), "modules_to_save do not name",
    ),
    "a dunder tensor": (lambda _, t: t.update({"saved.__dict__": torch.zeros(1)}), "modules_to_save do not name"),
    "a dunder tensor that is named": (
        both(
            lambda _, t: t.update({"saved.__dict__": torch.zeros(1)}),
            edit("config", modules_to_save=["2", "__dict__"]),
        ),
        "1 of the file's tensors trained in full .* not in the model",
    ),
    "modules outside": (edit("config", modules_to_save=["../x"]), "modules_to_save do not name: 2.bias"),
    "NaN lambda": (fill(LAMBDA, float("nan")), f"{LAMBDA} holds NaN or infinity"),
    "infinite gamma": (fill(GAMMA, -float("inf")), f"{GAMMA} holds NaN or infinity"),
    "NaN saved": (fill("saved.2.bias", float("nan")), "2.bias holds NaN or infinity"),
    "infinite saved": (fill("saved.2.bias", float("inf")), "2.bias holds NaN or infinity"),
    "NaN in 8 bits": (both(fill(LAMBDA, float("nan")), cast(LAMBDA, torch.float8_e5m2)), "holds NaN or infinity"),
    "integers": (cast(LAMBDA, torch.int64), "not floats"),
    "truth values": (cast(GAMMA, torch.bool), "not floats"),
    "complex": (cast(GAMMA, torch.complex64), "not floats"),
    "saved integers": (cast("saved.2.bias", torch.int32), "2.bias is torch.int32, in the model torch.float32"),
    "saved complex": (cast("saved.2.bias", torch.complex64), "2.bias is torch.complex64"),
    "version of 5000 digits": (lambda m, _: m.update(format_version="9" * 5000), "no valid format_version"),
    "version zero": (lambda m, _: m.update(format_version="0"), "no valid format_version"),
    "negative version": (lambda m, _: m.update(format_version="-1"), "no valid format_version"),
    "fractional version": (lambda m, _: m.update(format_version="1.0"), "no valid format_version"),
    "stored, but absent": (
        both(edit("bases", kind="stored"), edit("config", bases="stored")), "missing.*bases.A.*bases.B"
    ),
    "stored, but not said": (lambda _, t: t.update({"bases.A": torch.zeros(2, 16)}), "unexpected.*bases.A"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_lies(good: Path, case: str) -> None:
    tamper, message = CONTENTS[case]
    refuse(rewritten(good, tamper), message)
    assert [path.name for path in good.parent.iterdir()] == [good.name]


STORED: dict[str, tuple[Tamper, str]] = {
    "NaN": (fill("bases.B", float("nan")), "bases.B holds NaN"),
    "integers": (cast("bases.A", torch.int32), "must be a matrix of floats"),
    "flat": (lambda _, t: t.update({"bases.A": torch.zeros(4)}), "must be a matrix"),
    "empty": (lambda _, t: t.update({"bases.A": torch.zeros(0, 4)}), "must be a matrix"),
    "others": (fill("bases.B", 3.0), "the stored bases are"),
    "of a trillion": (edit("bases", wide=10**12), "the stored bases are"),
    "too small": (lambda _, t: t.update({"bases.B": t["bases.B"][:9]}), "the stored bases are"),
    "from a seed": (edit("config", bases="uniform"), "bases"),
    "by a seed": (both(edit("bases", kind="uniform"), edit("config", bases="uniform")), "unexpected.*bases.A"),
}


def stored(folder: Path) -> Path:
    """A file that holds its bases."""
    model = mlp()
    given = stored_bases(torch.randn(2, 8), torch.randn(16, 16))
    config = RandLoRAConfig(rank=2, target_modules=["0", "2"], bases="stored")
    add_adapter(make_plan(model, config, "default", given), trainable=True)
    randomize(model)
    return save_adapter(model, folder / "adapter.safetensors")


@pytest.mark.parametrize("case", STORED)
def test_stored_bases_that_lie(tmp_path: Path, case: str) -> None:
    path = stored(tmp_path)
    load_adapter(mlp(), path)
    tamper, message = STORED[case]
    refuse(rewritten(path, tamper), message)


def test_a_buffer_may_hold_infinity(tmp_path: Path) -> None:
    """Masks hold infinity; parameters never do."""

    def make() -> nn.Sequential:
        model = mlp()
        model[1].register_buffer("mask", torch.tensor([0.0, -float("inf")]))
        return model

    model, fresh = make(), make()
    inject(model, RandLoRAConfig(rank=2, target_modules=["0", "2"], modules_to_save=["1"]))
    load_adapter(fresh, save_adapter(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(fresh[1].mask, model[1].mask)


def test_a_folder_may_not_point_to_other_files(tmp_path: Path, good: Path) -> None:
    """PEFT's settings name models and revisions, and none of them is opened."""
    folder = tmp_path / "peft"
    folder.mkdir()
    values = {"peft_type": "RANDLORA", "base_model_name_or_path": "../../secret", "revision": "../adapter.safetensors"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    refuse(folder, "has no adapter_model.safetensors")


def test_a_file_that_is_overwritten_later_does_not_change_the_bases(tmp_path: Path) -> None:
    """Tensors that safetensors reads are views of the file; only an overwrite in place reaches them."""
    path = stored(tmp_path)
    model = mlp()
    load_adapter(model, path)
    expected = model(X)
    path.write_bytes(b"\1" * path.stat().st_size)
    gc.collect()
    bases = next(adapted_modules(model))[3].slots["default"].bases
    bases._tensors.clear()
    assert torch.equal(model(X), expected)
