"""The checksum of an adapter file's content, which finds damage and what was altered by mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from randlora_vision.checksums import CRC32, NAMES, checksum
from randlora_vision.errors import printable_errors

_ENTRIES = ("format", "format_version", "config", "bases", "targets")


def content_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], algorithm: str = CRC32) -> str:
    """The checksum of the metadata, then of the tensors by name, each after its name, dtype and shape."""

    def parts() -> Iterator[bytes | memoryview]:
        for key in _ENTRIES if algorithm != CRC32 else (*_ENTRIES, "parts"):  # SHA-256 is older than parts
            yield f"{key}={metadata.get(key)}\n".encode(errors="surrogatepass")
        for name in sorted(tensors):
            tensor = tensors[name]
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

    return checksum(parts(), algorithm)


def check(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], algorithm: str) -> None:
    """Raise ValueError unless the content has the checksum that its metadata say."""
    check_digits(path, content_checksum(tensors, metadata, algorithm), metadata, algorithm)


@printable_errors
def check_digits(path: Path, digits: str, metadata: Mapping[str, str], algorithm: str) -> None:
    """Raise ValueError unless the metadata of a file say these digits."""
    if metadata.get(algorithm) != digits:
        name = NAMES[algorithm]
        raise ValueError(f"{path} was altered or damaged after it was written: its {name} does not match") from None
