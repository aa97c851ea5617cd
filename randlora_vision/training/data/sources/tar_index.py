"""The samples of a shard from an index that is made once, because a pass over the headers reads the whole shard.

The index is a file of two lines of JSON beside the shard, or in the cache folder if that place cannot be written. It
belongs to one version of one file: its path, size and time of the last change, which are in the first line, with the
checksum of the second line, the samples.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from randlora_vision.files.atomic import fingerprint, write_text
from randlora_vision.files.cache import cache_root
from randlora_vision.files.text import read_text
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.training.data.sources.tar_members import Sample, TarImage, read_shard

_FORMAT = 1  # to be raised with every change of what `read_shard` returns
_KINDS = {"key": str, "image": list | None, "texts": dict[str, str], "unreadable": list[str]}


def indexed_shard(path: Path) -> tuple[list[Sample], str | None]:
    """Return what `read_shard` returns, from the index if there is one of this very file.

    Otherwise, and if the index is damaged, the shard is read and the index is written, unless the shard cannot be read
    to its end.
    """
    try:
        status = path.stat()
    except OSError:
        return read_shard(path)
    identity = {
        "format": _FORMAT,
        "shard": os.path.abspath(path),
        "size": status.st_size,
        "changed": status.st_mtime_ns,
    }
    for place in _places(path):
        with contextlib.suppress(OSError, ValueError):  # it is made again
            return _read(place, path, identity), None
    samples, reason = read_shard(path)
    if reason is None:
        rows = json.dumps(list(map(_row, samples)))
        for place in _places(path):
            with contextlib.suppress(OSError):  # without an index, the shard is read again next time
                write_text(place, f"{json.dumps(_header(identity, rows))}\n{rows}")
                break
    return samples, reason


def _places(path: Path) -> Iterator[Path]:
    yield path.with_name(f".{path.name}.index.jsonl")
    yield cache_root() / "shards" / f"{fingerprint(os.path.abspath(path), length=24)}.jsonl"


def _header(identity: Mapping[str, Any], rows: str) -> dict[str, Any]:
    return {**identity, "sha256": hashlib.sha256(rows.encode()).hexdigest()}


def _row(sample: Sample) -> dict[str, Any]:
    image = sample.image
    assert image is None or isinstance(image, TarImage)
    return {
        "key": sample.key,
        "image": image and [image.name, image.offset, image.size],
        "texts": sample.texts,
        "unreadable": sample.unreadable,
    }


def _read(place: Path, path: Path, identity: Mapping[str, Any]) -> list[Sample]:
    """Return the samples in an index; raise ValueError if it is damaged or of another file."""
    header, _, rows = read_text(place).partition("\n")
    if parse_json(header, place) != _header(identity, rows):
        raise ValueError(f"{place} is not the index of {path}")
    return [_sample(row, path, place) for row in check_type(parse_json(rows, place), list, place)]


def _sample(row: Any, path: Path, place: Path) -> Sample:
    values = check_object(row, _KINDS, place)
    image = None
    if values["image"] is not None:
        name, offset, size = values["image"]
        check_object({"name": name, "offset": offset, "size": size}, {"name": str, "offset": int, "size": int}, place)
        image = TarImage(path, name, offset, size)
    return Sample(path, values["key"], image, values["texts"], unreadable=values["unreadable"])
