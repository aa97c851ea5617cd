"""Files of every version of the format: what was damaged is noticed, and the checksum is what the format says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from randlora_vision.adapters.arithmetic import weighted_sum_files
from randlora_vision.files import bundle
from randlora_vision.files.adapter_file import read
from tests.adapter_files import Tamper, edit, opened, rewritten, seal
from tests.files.test_hostile_files import json_equal
from tests.golden.make import FILES, HERE, NEWEST

SHA256, CRC32 = "its SHA-256 does not match", "its CRC-32 does not match"


@pytest.mark.parametrize("name", ["saved_modules", "stored", "bundle"])
@pytest.mark.parametrize("folder", [HERE, NEWEST], ids=lambda folder: folder.name)
def test_every_flipped_bit_and_every_cut_is_noticed(folder: Path, name: str, tmp_path: Path) -> None:
    """In the header, and in the first and the last byte of each tensor."""
    data = (folder / f"{name}.safetensors").read_bytes()
    choice, path, end = random.Random(name), tmp_path / "a.safetensors", 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edges = {place for key, held in header.items() if key != "__metadata__" for place in held["data_offsets"]}
    positions = {*choice.sample(range(end), 25), *(end + place + by for place in edges for by in (-1, 0))}
    assert len(edges) > 4
    for position in sorted(positions - {len(data)}):
        flipped = bytearray(data)
        flipped[position] ^= 1 << choice.randrange(8)
        for damaged in (bytes(flipped), data[:position]):
            path.write_bytes(damaged)
            if not json_equal(data, damaged):
                with pytest.raises(ValueError) as caught:
                    bundle.read(path)
                assert str(path) in str(caught.value)
    path.write_bytes(data)
    bundle.read(path)


@pytest.mark.parametrize("name", [*FILES, "bundle"])
def test_the_checksum_of_a_file_is_that_of_the_format(name: str) -> None:
    for folder in (HERE, NEWEST):
        tensors, metadata = opened(folder / f"{name}.safetensors")
        resealed = dict(metadata)
        if metadata["format_version"] != "2":
            seal(tensors, resealed)
        assert resealed == metadata
    assert "sha256" not in json.dumps(metadata)


ALTERED: dict[str, tuple[Path, str, Tamper, str]] = {
    "1, other bases": (HERE, "uniform", edit("bases", seed=1), SHA256),
    "1 called 3": (HERE, "uniform", lambda m, _: m.update(format_version="3"), CRC32),
    "1 called 2": (HERE, "uniform", lambda m, _: m.update(format_version="2"), SHA256),
    "2 called 3": (HERE, "bundle", lambda m, _: m.update(format_version="3"), CRC32),
    "3 called 1": (NEWEST, "uniform", lambda m, _: m.update(format_version="1"), SHA256),
    "3 called 2": (NEWEST, "bundle", lambda m, _: m.update(format_version="2"), SHA256),
    "a text that is moved": (NEWEST, "uniform", lambda m, _: m.update(config=m["bases"], bases=m["config"]), CRC32),
    "parts in an adapter": (NEWEST, "uniform", lambda m, _: m.update(parts="{}"), CRC32),
    "no parts in a bundle": (NEWEST, "bundle", lambda m, _: m.pop("parts"), CRC32),
    "a number": (NEWEST, "uniform", lambda m, _: m.update(crc32=str(int(m["crc32"], 16))), CRC32),
    "capitals": (NEWEST, "uniform", lambda m, _: m.update(crc32=f"0x{m['crc32']}"), CRC32),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_was_altered_is_refused(case: str, tmp_path: Path) -> None:
    folder, name, tamper, message = ALTERED[case]
    (path := tmp_path / "a.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        bundle.read(rewritten(path, tamper, sealed=False))


def test_equal_tensors_cannot_change_places(tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes((NEWEST / "uniform.safetensors").read_bytes())
    names = [name for name in opened(path)[0] if name.startswith("gamma")]

    def swap(_: dict[str, str], tensors: dict[str, object]) -> None:
        first, second = names[:2]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    with pytest.raises(ValueError, match=CRC32):
        read(rewritten(path, swap, sealed=False))


def test_a_checksum_of_another_version_is_ignored_beside_the_right_one(tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes((NEWEST / "uniform.safetensors").read_bytes())
    read(rewritten(path, lambda m, _: m.update(sha256="0" * 64), sealed=False))


def test_files_of_an_old_version_add_up_to_one_of_the_newest(tmp_path: Path) -> None:
    """Even if other bases have to be drawn for it: a wrong SHA-256 of them is found out."""
    written = [
        weighted_sum_files({folder / "uniform.safetensors": 0.5}, tmp_path / "sum.safetensors").read_bytes()
        for folder in (HERE, NEWEST)
    ]
    assert written[0] == written[1]
    (path := tmp_path / "a.safetensors").write_bytes((HERE / "uniform.safetensors").read_bytes())
    rewritten(path, edit("bases", sha256="0" * 64))
    with pytest.raises(ValueError, match=r"\(SHA-256 \w{12}\.\.\., expected 000000000000\.\.\.\)"):
        weighted_sum_files({path: 0.5}, tmp_path / "sum.safetensors")
