"""Names that file systems allow, files that are not regular, and text that is not Unicode, in every reader of data."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest

from randlora_vision.errors import user_errors
from randlora_vision.files.text import as_utf8
from randlora_vision.files.untrusted import check_container, read_json
from randlora_vision.training.data.class_names import read_templates, with_class_names
from randlora_vision.training.data.cleaning import clean_caption, clean_label
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.caption_folder import caption_folder_part, read_captions
from randlora_vision.training.data.sources.tar_shards import is_shards
from randlora_vision.training.evaluation.grids import shortened
from tests.data_helpers import listed, png, read, some_digits, write_images, write_shard, write_text

IMAGES = [image for image, _ in some_digits()][:6]
ODD = ("two\nlines", b"caf\xe9".decode("utf-8", "surrogateescape"), "-rf", "\x1b[31mred", "x" * 240, "tab\tand | pipe")
"""Names with a line break, bytes that are not UTF-8, a dash, a control character, much text, and separators."""


@pytest.mark.parametrize("name", ODD)
def test_a_broken_file_of_any_name_is_one_line_of_the_list(name: str, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        write_images(tmp_path / "data" / label, IMAGES[:3])
    (tmp_path / "data" / "cat" / f"{name}.png").write_bytes(b"?")
    skipped = SkipList(tmp_path / "skipped.txt")
    splits = read(tmp_path / "data", skipped)
    (line,) = (tmp_path / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert line.isprintable() or "\t" in line and line.replace("\t", "").isprintable()
    assert skipped.count() == 1 and json.loads(json.dumps(splits.record(), ensure_ascii=False))


@pytest.mark.parametrize("name", ODD)
def test_a_class_of_any_name_is_text(name: str, tmp_path: Path) -> None:
    for label in (name, "dog"):
        write_images(tmp_path / "data" / label, IMAGES[:3])
    names = read(tmp_path / "data").class_names
    assert len(names) == 2
    open_clip.tokenize([f"a photo of a {label}" for label in names])
    for label in names:
        label.encode("utf-8")
        assert shortened(label).isprintable()


@pytest.mark.parametrize("name", ODD)
def test_data_of_any_name_has_a_title_that_can_be_written(name: str, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        write_images(tmp_path / name / label, IMAGES[:3])
    title = read(tmp_path / name).name
    title.encode("utf-8")
    assert title.isprintable()


def test_what_a_terminal_cannot_show_is_printed_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    user_errors(lambda: print("caf\udce9 ✓"))()
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\udce9 \\u2713\n"  # type: ignore[attr-defined]


def test_lone_surrogates_of_a_json_file_are_spelled_out(tmp_path: Path) -> None:
    """Tokenizers raise errors for them: half of an emoji, where a caption was cut, is common."""
    (name,) = write_images(tmp_path, IMAGES[:1])
    write_text(tmp_path / "metadata.jsonl", f'{{"file_name": "{name}", "text": "a cat \\ud83d"}}')
    (caption,) = read_captions(tmp_path, SkipList())
    assert caption[1] == r"a cat \ud83d" and open_clip.tokenize([caption[1]]) is not None
    assert clean_caption("\udcff") == r"\xff" and clean_label("\ud800x") == r"\ud800x"
    assert as_utf8("\ud800\udcff") == r"\ud800\udcff"


def test_names_longer_than_a_path_are_not_files(tmp_path: Path) -> None:
    """`Path.is_file` raises OSError for them before Python 3.12."""
    long = "x" * 5000
    assert is_shards("::".join(f"{long}-{n}.tar" for n in range(2)))
    with pytest.raises(ValueError, match="has no {}"):
        read_templates([long])
    (name,) = write_images(tmp_path, IMAGES[:1])
    lines = [{"file_name": f"{long}.png", "text": "a"}, {"file_name": name, "text": "b"}]
    write_text(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    skipped = SkipList(tmp_path / "skipped.txt")
    assert [caption for _, caption in read_captions(tmp_path, skipped)] == ["b"] and skipped.count() == 1


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere")


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "dangling link": dangling,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "no bytes": Path.touch,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_beside_captioned_images_are_recorded(kind: str, tmp_path: Path) -> None:
    for name in write_images(tmp_path, IMAGES[:2]):
        (tmp_path / name).with_suffix(".txt").write_text("a digit")
    SPECIAL[kind](tmp_path / "special.png")
    (tmp_path / "folder.png").mkdir()
    if kind != "no bytes":
        (tmp_path / "001.txt").unlink()
        SPECIAL[kind](tmp_path / "001.txt")
    skipped = SkipList(tmp_path / "skipped.txt")
    part = caption_folder_part(tmp_path, skipped)
    assert [path.name for path in part.images] == ["000.png", "001.png"]
    assert part.captions == [["a digit"], [None if kind != "no bytes" else "a digit"]]
    assert set(listed(tmp_path / "skipped.txt")) == {"special.png", *({"001.txt"} if kind != "no bytes" else ())}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_in_place_of_data_are_an_error(kind: str, tmp_path: Path) -> None:
    for name in ("x.csv", "x.tar", "names.txt", "x.safetensors", "x.json"):
        SPECIAL[kind](tmp_path / name)
    splits = ImageSplits(name="x", class_names=["a"], images={}, labels={}, origin="")
    for attempt in (
        lambda: read(tmp_path / "x.csv"),
        lambda: read(tmp_path / "x.tar"),
        lambda: with_class_names(splits, str(tmp_path / "names.txt")),
        lambda: check_container(tmp_path / "x.safetensors"),
        lambda: read_json(tmp_path / "x.json"),
    ):
        with pytest.raises(
            (ValueError, OSError),
            match="regular file|no shard found|empty|no file|holds no names|damaged|not valid JSON|No such",
        ):
            attempt()


def test_a_stray_quote_in_a_table_of_class_names(tmp_path: Path) -> None:
    splits = ImageSplits(name="x", class_names=["a", "b"], images={}, labels={}, origin="")
    with pytest.raises(ValueError, match=r"names.csv is not a readable table \(is a quote missing"):
        with_class_names(splits, str(write_text(tmp_path / "names.csv", 'a,cat\nb,"dog\n')))


def test_members_of_any_name_in_a_shard(tmp_path: Path) -> None:
    members = [(name, {"png": png(IMAGES[n]), "txt": "a digit"}) for n, name in enumerate(ODD)]
    shard = write_shard(tmp_path / "x.tar", [*members, ("\udce9\n2", {"txt": "no image"})])
    for _ in range(2):  # the second time from the index
        skipped = SkipList(tmp_path / "skipped.txt")
        splits = read(shard, skipped)
        assert sum(map(len, splits.images.values())) == len(ODD) and skipped.count() == 1
        json.dumps(splits.record(), ensure_ascii=False).encode("utf-8")
