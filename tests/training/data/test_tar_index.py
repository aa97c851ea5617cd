"""The index of a shard: made once, used while the shard is the same, and made again if it is damaged or another's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.files.cache import cache_root
from randlora_vision.training.data.sources import tar_index
from randlora_vision.training.data.sources.tar_index import indexed_shard
from randlora_vision.training.data.sources.tar_members import read_shard
from tests.data_helpers import DIGITS, png, write_shard

SAMPLES: list[tuple[str, dict[str, Any]]] = [
    (f"{n}", {"png": png(image), "txt": name, "json": {"width": 32}}) for n, (image, name) in enumerate(DIGITS)
]
SAMPLES += [("caption only", {"txt": "a"}), ("not utf-8", {"png": b"?", "txt": b"\xff"}), ("ü\udcff", {"jpg": b"?"})]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Return the list of the shards that were read to their ends."""
    done: list[Path] = []

    def counted(path: Path) -> Any:
        done.append(path)
        return read_shard(path)

    monkeypatch.setattr(tar_index, "read_shard", counted)
    monkeypatch.setenv("RANDLORA_CACHE", str(tmp_path / "cache"))
    return done


def known(samples: Any) -> list[Any]:
    return [(s.key, s.image, s.texts, s.unreadable) for s in samples[0]]


def test_a_shard_is_read_once_until_it_changes(passes: list[Path], tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", SAMPLES)
    truth = read_shard(path)
    assert known(indexed_shard(path)) == known(indexed_shard(path)) == known(truth) and len(passes) == 1
    assert truth[0][0].image == indexed_shard(path)[0][0].image
    status = path.stat()
    write_shard(path, [(key, {**members, "txt": "another", "cls": "1"}) for key, members in SAMPLES])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size alone
    assert indexed_shard(path)[0][0].texts["txt"] == "another" and len(passes) == 2
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another time alone
    assert indexed_shard(path) and len(passes) == 3
    moved = path.rename(tmp_path / "y.tar")
    (tmp_path / ".x.tar.index.jsonl").rename(tmp_path / ".y.tar.index.jsonl")  # another path alone
    assert {sample.shard for sample in indexed_shard(moved)[0]} == {moved} and len(passes) == 4


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "one digit": lambda whole: whole[:-200] + whole[-200:].replace(b"1", b"2", 1),
    "not text": lambda whole: b"\x80\x04\x95",
    "another program's": lambda whole: b'{"wids_version": 1, "shardlist": []}\n[]',
    "of another format": lambda whole: whole.replace(b'"format": 1', b'"format": 0'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_index_is_made_again(how: str, passes: list[Path], tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", SAMPLES)
    truth = known(indexed_shard(path))
    index = tmp_path / ".x.tar.index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(DAMAGE[how](whole))
    assert index.read_bytes() != whole
    assert known(indexed_shard(path)) == truth and len(passes) == 2
    assert index.read_bytes() == whole
    header = json.loads(whole.partition(b"\n")[0])
    for rows in ("{}", "[1]", '[{"key": 1}]', json.dumps([{"key": "", "image": [1], "texts": {}, "unreadable": []}])):
        index.write_text(json.dumps({**tar_index._header(header, rows)}) + "\n" + rows)
        assert known(indexed_shard(path)) == truth and index.read_bytes() == whole


def test_where_nothing_can_be_written(passes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_shard(folder / "x.tar", SAMPLES)
    write, denied = tar_index.write_text, [folder]

    def guarded(place: Path, text: str) -> None:
        if any(place.is_relative_to(other) for other in denied):
            raise PermissionError(13, "Permission denied")
        write(place, text)

    monkeypatch.setattr(tar_index, "write_text", guarded)
    assert known(indexed_shard(path)) == known(indexed_shard(path)) and len(passes) == 1
    assert len(list((cache_root() / "shards").iterdir())) == 1 and [p.name for p in folder.iterdir()] == ["x.tar"]
    denied.append(cache_root())
    os.utime(path)
    assert known(indexed_shard(path)) == known(indexed_shard(path)) and len(passes) == 3


def test_a_broken_shard_has_no_index(passes: list[Path], tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", SAMPLES)
    path.write_bytes(path.read_bytes()[:3000])
    for _ in range(2):
        assert "after byte" in (indexed_shard(path)[1] or "")
    assert len(passes) == 2 and [p.name for p in tmp_path.iterdir()] == ["x.tar"]
    assert indexed_shard(tmp_path / "nowhere.tar")[1]
