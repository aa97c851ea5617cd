"""Checks of untrusted files before they are opened: a safetensors file with a header of reasonable size.

Nothing is ever unpickled: opening a pickle runs whatever code its author put there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from randlora_vision.files.text import require_regular
from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import PARTS

_HEADER_LIMIT = 32 * 2**20
"""Maximum bytes of a safetensors header, which is parsed whole; real ones are below 1 MiB for the largest models."""
_JSON_LIMIT = 8 * 2**20
_PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
_ADVICE = (
    "is a pickle: opening one runs the code in it, so it is never opened. Get a .safetensors file, or convert it "
    "yourself if you trust its author"
)


def check_container(path: Path) -> None:
    """Raise ValueError unless `path` can be a safetensors file, judging only by its name and first bytes."""
    if path.suffix.lower() in _PICKLES:
        raise ValueError(f"{path} {_ADVICE}")
    require_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(10)
    # A header of 640 bytes starts like a pickle too, but the ninth byte of a safetensors file is always a brace.
    if start[8:9] != b"{" and (start.startswith(b"PK\x03\x04") or start[:1] == b"\x80"):
        raise ValueError(f"{path} is not a readable safetensors file: it {_ADVICE}")
    header = int.from_bytes(start[:8], "little")
    if len(start) < 10 or header > size - 8:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged?)")
    if header > _HEADER_LIMIT:
        raise ValueError(f"{path} is not a readable safetensors file: its header of {header:,} bytes is too large")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a safetensors file; raise ValueError for one that is not readable."""
    check_container(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a small file; raise ValueError if it is too large or holds something else."""
    require_regular(path)
    if path.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{path} is too large for a configuration: {path.stat().st_size:,} bytes")
    values: dict[str, Any] = check_type(parse_json(path.read_bytes(), path), dict, path, "the file's content")
    return values


def check_finite_pairs(
    where: str | os.PathLike[str], trained: Mapping[str, tuple[Tensor, Tensor]], *cause: str
) -> None:
    """As `check_finite`, for target name -> (lambda, gamma)."""
    named = {f"{part} of {name}": t for name, pair in trained.items() for part, t in zip(PARTS, pair, strict=True)}
    check_finite(where, named, *cause)


def check_finite(
    where: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    cause: str = "the training that produced it diverged",
) -> None:
    """Raise ValueError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ValueError(f"{where}: {name} holds NaN or infinity: {cause}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    wide = real.float() if real.itemsize == 1 else real  # float8 has no order
    return all(bound.isfinite() for bound in wide.aminmax())  # NaN is both; needs no memory, unlike `isfinite`
