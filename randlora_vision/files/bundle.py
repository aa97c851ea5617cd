"""One file with the adapters of several models that were trained together, such as a denoiser and its text encoders.

The file has format version 2. Each part has the content of a version 1 file: its tensors are stored under ``PART/``,
and its metadata, including the digest, in the entry ``parts``, a JSON object keyed by part. ``sha256`` is the digest of
that entry.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from randlora_vision.errors import printable_errors
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.metadata import FORMAT
from randlora_vision.json_values import check_type, parse_json

_NAME = re.compile(r"\w+")


def write(path: Path, parts: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]) -> None:
    """Write the output of `adapter_file.pack` for every part (an identifier); equal content gives equal bytes."""
    assert all(_NAME.fullmatch(name) for name in parts)
    tensors = {f"{part}/{name}": tensor for part, (held, _) in parts.items() for name, tensor in held.items()}
    listed = json.dumps({part: dict(sorted(parts[part][1].items())) for part in sorted(parts)})
    metadata = {
        "format": FORMAT,
        "format_version": str(adapter_file.BUNDLE_VERSION),
        "parts": listed,
        "sha256": _digest(listed),
    }
    adapter_file.write(path, tensors, metadata)


@printable_errors
def read(path: Path) -> dict[str, AdapterFile]:
    """Read every part of a bundle, or an adapter file as one part named ""; raises as `adapter_file.read` does."""
    tensors, metadata = adapter_file.open_file(path)
    if metadata["format_version"] != str(adapter_file.BUNDLE_VERSION):
        return {"": adapter_file.unpack(path, tensors, metadata)}
    listed = metadata.get("parts", "")
    if metadata.get("sha256") != _digest(listed):
        raise ValueError(f"{path} was altered or damaged after it was written: its SHA-256 does not match")
    try:
        parts = check_type(parse_json(listed, "parts"), dict[str, dict[str, str]], "parts", "the content")
        if not parts or not all(_NAME.fullmatch(name) for name in parts):
            raise ValueError("parts: there are none, or a name is not valid")
    except ValueError as error:
        raise ValueError(f"{path} has malformed metadata (parts): {error}") from None
    held: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        if part not in held:
            raise ValueError(f"{path} does not hold the tensors that it lists: unexpected {name}")
        held[part][own] = tensor
    return {part: adapter_file.unpack(path, held[part], parts[part]) for part in parts}


def _digest(listed: str) -> str:
    return hashlib.sha256(listed.encode()).hexdigest()
