"""The adapter file: one .safetensors file with lambda and gamma, and a seed instead of the bases.

Targets with equal (R, N, m) share two tensors, ``lambda.RxN.m`` (count, R, N) and ``gamma.RxN.m`` (count, N, m), in
the order of the target list. The metadata hold this list compressed, so the header stays small even for deep models.
Modules trained in full are stored as ``saved.PATH``. Bases that were not drawn from a seed ("stored") are the tensors
``bases.A`` and ``bases.B``. Equal content gives equal bytes. The metadata are strings:

    format           "randlora_vision"
    format_version   "3"
    config           JSON of the RandLoRAConfig
    bases            JSON of the BasesSpec and the CRC-32 of the bases
    targets          base64 of zlib of a JSON list of [name, O, I, R, alpha]
    crc32            of the entries above and the tensors

The adapters of several models are in one file too: see `randlora_vision.files.bundle`. Files of version 1, which hold
SHA-256 in place of CRC-32 (under the key sha256), and bundles of version 2 are read, but no longer written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from randlora_vision.bases import BasesSpec, get_bases
from randlora_vision.bases.stored import STORED, StoredBases, stored_bases
from randlora_vision.checksums import CRC32, SHA256, Checksum
from randlora_vision.config import RandLoRAConfig
from randlora_vision.errors import printable_errors
from randlora_vision.files import metadata as _metadata
from randlora_vision.files.atomic import replacing
from randlora_vision.files.damage import check, content_checksum
from randlora_vision.files.metadata import FORMAT, VERSION, is_bundle
from randlora_vision.files.untrusted import check_finite, read_tensors
from randlora_vision.names import PARTS, listing, matches_one_of, with_parents
from randlora_vision.report import Target

_PLACEHOLDER = "0" * 8  # a CRC-32, for the size estimate
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        config: The adapter's configuration.
        spec: The spec of its bases.
        bases_checksum: The checksum of the bases in the file; None for an adapter that was not read from one.
        targets: The adapted weights in the file's order; their `kind` is empty if they were read from a file, which
            does not store it.
        trained: Target name -> (lambda (R, N), gamma (N, m)).
        saved: Path -> tensor of a module trained in full.
        stored: The bases themselves if they were not drawn from a seed, as get_bases(spec) cannot create them.
        notes: Assumptions that the reader had to make.
    """

    config: RandLoRAConfig
    spec: BasesSpec
    bases_checksum: Checksum | None
    targets: tuple[Target, ...]
    trained: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor]
    stored: StoredBases | None = None
    notes: tuple[str, ...] = ()


def pack(
    config: RandLoRAConfig,
    spec: BasesSpec,
    bases_crc32: str,
    targets: tuple[Target, ...],
    trained: Mapping[str, tuple[Tensor, Tensor]],
    saved: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that represent an adapter."""
    values = {name: [tensor.detach().cpu() for tensor in pair] for name, pair in trained.items()}
    widest = max((tensor.dtype for pair in values.values() for tensor in pair), key=lambda dtype: dtype.itemsize)
    tensors: dict[str, Tensor] = {}
    for group, members in _groups(targets).items():
        tensors[f"lambda.{group}"] = torch.stack([values[name][0] for name in members]).to(widest)
        tensors[f"gamma.{group}"] = torch.stack([values[name][1] for name in members]).to(widest)
    tensors.update({f"saved.{name}": tensor.detach().cpu().contiguous() for name, tensor in saved.items()})
    bases = get_bases(spec)
    if isinstance(bases, StoredBases):
        tensors["bases.A"], tensors["bases.B"] = bases.given
    return tensors, _metadata.written(config, spec, bases_crc32, targets)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the output of `pack` with its checksum, under a temporary name, then rename the file."""
    described = {"format": FORMAT, "format_version": str(VERSION), **metadata}
    described[CRC32] = content_checksum(tensors, described)
    with replacing(path) as temporary:
        temporary.write_bytes(_in_order(safetensors.torch.save(dict(tensors), described)))


def read(path: Path) -> AdapterFile:
    """Read and verify an adapter file; nothing but safetensors and JSON is ever parsed.

    Raises:
        ValueError: If the file is not an adapter file, is truncated, altered or of a newer format, or is a bundle of
            several adapters; each case has its own message.
    """
    content = _open_adapter(path)
    check(path, *content)
    return unpack(path, *content)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[AdapterFile]:
    """As `read`, but the checksum of the tensors is computed during the block, in a thread of its own.

    The block must not act on the content, as what is wrong with it is raised at the end, in place of other errors.
    """
    content = _open_adapter(path)
    with ThreadPoolExecutor(max_workers=1) as thread:
        checked = thread.submit(check, path, *content)
        try:
            yield unpack(path, *content)
        except Exception:
            checked.result()
            raise
        checked.result()


def _open_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    tensors, metadata, algorithm = open_file(path)
    if is_bundle(metadata):
        raise ValueError(
            f"{path} holds adapters for the components of a pipeline: load it with "
            "randlora_vision.integrations.diffusers.load_adapter(pipe, path)"
        )
    return tensors, metadata, algorithm


@printable_errors
def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read the tensors, the metadata and which algorithm the checksums of this version of the format are of.

    Raises ValueError for a file of another format or of a newer version.
    """
    tensors, metadata = read_tensors(path)
    _metadata.check_version(path, metadata)
    return tensors, metadata, CRC32 if metadata["format_version"] == str(VERSION) else SHA256


def file_bytes(
    config: RandLoRAConfig,
    spec: BasesSpec,
    targets: tuple[Target, ...],
    dtype: torch.dtype,
    saved: Mapping[str, Tensor],
) -> int:
    """The exact size in bytes of the file that `write` would create; `dtype` is that of lambda and gamma."""
    shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
    for group, members in _groups(targets).items():
        first = next(t for t in targets if t.name == members[0])
        for part, sides in zip(PARTS, first.trained_shapes, strict=True):
            shapes[f"{part}.{group}"] = (dtype, [len(members), *sides])
    shapes.update({f"saved.{name}": (tensor.dtype, list(tensor.shape)) for name, tensor in saved.items()})
    if spec.kind == STORED:
        shapes["bases.A"] = (torch.float32, [spec.rank, spec.narrow])
        shapes["bases.B"] = (torch.float32, [spec.wide, spec.columns])
    metadata = {
        **{"format": FORMAT, "format_version": str(VERSION), CRC32: _PLACEHOLDER},
        **_metadata.written(config, spec, _PLACEHOLDER, targets),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (kind, shape) in sorted(shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = offset + kind.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _DTYPES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return 8 + len(_header_text(header)) + offset


def _header_text(header: Mapping[str, Any]) -> bytes:
    """The header of a safetensors file: compact JSON, padded with spaces to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata, which the library writes in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = _header_text(header)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _groups(targets: Sequence[Target]) -> dict[str, list[str]]:
    """Group key -> target names, for targets whose lambda and gamma have equal shapes."""
    groups: dict[str, list[str]] = {}
    for target in targets:
        groups.setdefault(f"{target.rank}x{target.bases}.{target.narrow}", []).append(target.name)
    return groups


@printable_errors
def unpack(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], algorithm: str) -> AdapterFile:
    """Read the output of `pack`, in a file whose checksums are of this algorithm; raise ValueError if it is malformed.

    Its checksum is not checked here.
    """
    config, spec, bases_checksum, targets = _metadata.parsed(path, metadata, algorithm)
    groups = _groups(targets)
    expected = {f"{part}.{group}" for group in groups for part in ("lambda", "gamma")}
    expected |= {"bases.A", "bases.B"} if spec.kind == STORED else set()
    present = {name for name in tensors if not name.startswith("saved.")}
    if expected != present:
        missing, extra = sorted(expected - present), sorted(present - expected)
        raise ValueError(
            f"{path} does not hold the tensors that it lists: missing [{listing(map(repr, missing))}], unexpected "
            f"[{listing(map(repr, extra))}]"
        )
    check_finite(path, {name: tensors[name] for name in sorted(expected)})
    trained: dict[str, tuple[Tensor, Tensor]] = {}
    by_name = {target.name: target for target in targets}
    for group, members in groups.items():
        lam, gamma = tensors[f"lambda.{group}"], tensors[f"gamma.{group}"]
        shapes = tuple((len(members), *shape) for shape in by_name[members[0]].trained_shapes)
        if (tuple(lam.shape), tuple(gamma.shape)) != shapes:
            raise ValueError(f"{path}: tensors of group {group} have shapes {lam.shape}, {gamma.shape}, not {shapes}")
        if not (lam.is_floating_point() and gamma.is_floating_point()):
            raise ValueError(f"{path}: tensors of group {group} have dtypes {lam.dtype}, {gamma.dtype}, not floats")
        trained.update({name: (lam[i], gamma[i]) for i, name in enumerate(members)})
    _metadata.check_sizes(path, spec, targets)
    prefix = len("saved.")
    saved = {name[prefix:]: tensor for name, tensor in tensors.items() if name.startswith("saved.")}
    asked = set(config.modules_to_save)
    foreign = [name for name in saved if not matches_one_of(asked, with_parents((name,)))]
    if foreign:
        raise ValueError(f"{path} holds tensors that its modules_to_save do not name: {listing(foreign)}")
    stored = None
    if spec.kind == STORED:
        try:
            stored = stored_bases(tensors["bases.A"], tensors["bases.B"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        claimed = {**dataclasses.asdict(spec), algorithm: bases_checksum.digits}
        found = {**dataclasses.asdict(stored.spec), algorithm: stored.checksum(algorithm)}
        if claimed != {key: found[key] for key in claimed}:
            raise ValueError(f"{path}: the stored bases are {found}, but the metadata say {claimed}")
        spec = stored.spec
    return AdapterFile(config, spec, bases_checksum, targets, trained, saved, stored)
