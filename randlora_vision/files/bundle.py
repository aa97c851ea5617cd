"""Adapters of several models that were trained together in one file: a denoiser and its text encoders.

A file of format version 2. Every part is what a file of version 1 holds: its tensors under ``PART/``, its metadata,
digest included, in the entry ``parts``, a JSON object by part. ``sha256`` is of that entry.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from randlora_vision.files import adapter_file as fileformat
from randlora_vision.files.adapter_file import AdapterFile

_NAME = re.compile(r"\w+")


def write(path: Path, parts: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]) -> None:
    """Write what `fileformat.pack` made of every part; names are Python identifiers.

    Equal content gives equal bytes.
    """
    assert all(_NAME.fullmatch(name) for name in parts)
    tensors = {f"{part}/{name}": tensor for part, (held, _) in parts.items() for name, tensor in held.items()}
    listed = json.dumps({part: dict(sorted(parts[part][1].items())) for part in sorted(parts)})
    metadata = {
        "format": fileformat.FORMAT,
        "format_version": str(fileformat.BUNDLE_VERSION),
        "parts": listed,
        "sha256": _digest(listed),
    }
    fileformat.write(path, tensors, metadata)


def read(path: Path) -> dict[str, AdapterFile]:
    """Read and verify every part of a bundle; an adapter file alone is the one part "".

    Raises:
        ValueError: As `fileformat.read` does.
    """
    tensors, metadata = fileformat.open_file(path)
    if metadata["format_version"] != str(fileformat.BUNDLE_VERSION):
        return {"": fileformat.unpack(path, tensors, metadata)}
    listed = metadata.get("parts", "")
    if metadata.get("sha256") != _digest(listed):
        raise ValueError(f"{path} was altered or damaged after it was written: its SHA-256 does not match")
    try:
        parts = dict(json.loads(listed))
        if not parts or not all(_NAME.fullmatch(name) and isinstance(part, dict) for name, part in parts.items()):
            raise ValueError("no parts, or none of ours")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has malformed metadata (parts): {error}") from None
    held: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        if part not in held:
            raise ValueError(f"{path} does not hold what it lists: unexpected {name}")
        held[part][own] = tensor
    return {part: fileformat.unpack(path, held[part], parts[part]) for part in parts}


def _digest(listed: str) -> str:
    return hashlib.sha256(listed.encode()).hexdigest()
