"""Adapter files taken apart and put together again, by the description of the format and not by the library.

Their checksums are computed from the bytes that the safetensors library reads, with zlib and hashlib alone.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

Tamper = Callable[[dict[str, str], dict[str, Tensor]], object]
DTYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "F8_E5M2": "torch.float8_e5m2",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "BOOL": "torch.bool",
    "C64": "torch.complex64",
}
ENTRIES = ("format", "format_version", "config", "bases", "targets")


def summed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes whose checksum a file of version 1 or 3 holds."""
    raw = dict(safetensors.deserialize(safetensors.torch.save(tensors)))
    newest = metadata.get("format_version") != "1"
    data = b"".join(f"{key}={metadata.get(key)}\n".encode() for key in (*ENTRIES, *["parts"] * newest))
    for name in sorted(raw):
        held = raw[name]
        shape = ", ".join(map(str, held["shape"])) + "," * (len(held["shape"]) == 1)
        data += f"{name} {DTYPES[held['dtype']]} ({shape})\n".encode() + held["data"]
    return data


def seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Set the checksum, of the kind that the version has."""
    data = summed(tensors, metadata)
    if metadata.get("format_version") == "1":
        metadata["sha256"] = hashlib.sha256(data).hexdigest()
    else:
        metadata["crc32"] = f"{zlib.crc32(data):08x}"


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of the tensors, and the metadata."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def rewritten(path: Path, tamper: Tamper, sealed: bool = True) -> Path:
    """The file with its metadata or tensors changed, and a checksum that matches unless told otherwise."""
    tensors, metadata = opened(path)
    tamper(metadata, tensors)
    if sealed:
        seal(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def edit(key: str, **changes: object) -> Tamper:
    """Change values in one of the JSON objects of the metadata."""
    return lambda metadata, _: metadata.update({key: json.dumps({**json.loads(metadata[key]), **changes})})
