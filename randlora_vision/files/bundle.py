"""One file with the adapters of several models that were trained together, such as a denoiser and its text encoders.

The tensors of each part are stored under ``PART/``, and its metadata (config, bases and targets, as in
`randlora_vision.files.adapter_file`) in the entry ``parts``, a JSON object keyed by part. ``crc32`` is that of the
whole file. In version 2, which is read too, each part has the metadata of a file of version 1 with its own SHA-256,
and ``sha256`` is that of the entry ``parts``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from randlora_vision.checksums import SHA256, checksum
from randlora_vision.errors import printable_errors
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.damage import check, check_digits
from randlora_vision.files.metadata import is_bundle
from randlora_vision.json_values import check_type, parse_json

_NAME = re.compile(r"\w+")


def write(path: Path, parts: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]) -> None:
    """Write the output of `adapter_file.pack` for every part (an identifier); equal content gives equal bytes."""
    assert all(_NAME.fullmatch(name) for name in parts)
    tensors = {f"{part}/{name}": tensor for part, (held, _) in parts.items() for name, tensor in held.items()}
    listed = json.dumps({part: dict(sorted(parts[part][1].items())) for part in sorted(parts)})
    adapter_file.write(path, tensors, {"parts": listed})


@printable_errors
def read(path: Path) -> dict[str, AdapterFile]:
    """Read every part of a bundle, or an adapter file as one part named ""; raises as `adapter_file.read` does."""
    tensors, metadata, algorithm = adapter_file.open_file(path)
    listed = metadata.get("parts", "")
    by_part = is_bundle(metadata) and algorithm == SHA256
    if by_part:
        check_digits(path, checksum([listed.encode()], algorithm), metadata, algorithm)
    else:
        check(path, tensors, metadata, algorithm)
    if not is_bundle(metadata):
        return {"": adapter_file.unpack(path, tensors, metadata, algorithm)}
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
    for part in parts if by_part else ():
        check(path, held[part], parts[part], algorithm)
    return {part: adapter_file.unpack(path, held[part], parts[part], algorithm) for part in parts}
