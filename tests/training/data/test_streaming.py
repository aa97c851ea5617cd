"""Shards that are read in order: from disk, over HTTP and from programs, by the rules of all other sources."""

from __future__ import annotations

import functools
import gzip
import lzma
import re
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tar_members import read_shard
from randlora_vision.training.data.sources.tar_stream import stream_shard
from tests.data_helpers import DIGITS, listed, pixels, png, read, shards, table, write_shard

webdataset = pytest.importorskip("webdataset")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three shards of digits with captions, a table of them, and shards with classes."""
    folder = tmp_path_factory.mktemp("data")
    shards(folder)
    shards(folder / "alone")
    shards(folder / "cls", "cls")
    table(folder)
    table(folder / "classes", column="label")
    whole = (folder / "train-01.tar").read_bytes()
    (folder / "x.tar.gz").write_bytes(gzip.compress(whole))
    (folder / "x.tar.xz").write_bytes(lzma.compress(whole))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Serve the folder and return its URL."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def streamed(data: str, folder: Path, skipped: SkipList | None = None, **options: Any) -> Any:
    options.setdefault("val_data", str(folder / "data.csv"))
    return read(data, skipped, streaming=True, **options)


def everything(splits: Any, skipped: SkipList | None = None) -> list[tuple[bytes, Any]]:
    usable = (item for shard in splits.stream.shards for item in splits.stream.usable(shard, skipped or SkipList()))
    return [(pixels(image), words) for image, words in usable]


@pytest.mark.parametrize(
    "spec",
    [
        "{http}/train-{00..02}.tar",
        "{http}/train-00.tar::{http}/train-{01,02}.tar",
        "file://{folder}/train-{00..02}.tar",
        "pipe:cat {folder}/train-{00..02}.tar",
        "pipe:curl -s {http}/train-00.tar::{folder}/train-0[12].tar",
        "{folder}/alone",
    ],
)
def test_every_address_gives_what_webdataset_reads(spec: str, folder: Path, server: str) -> None:
    spec = spec.replace("{http}", server).replace("{folder}", str(folder))
    splits = streamed(spec, folder)
    expected = []
    for number in range(3):
        with (folder / f"train-0{number}.tar").open("rb") as stream:
            members = webdataset.tariterators.tar_file_expander([{"url": "", "stream": stream}])
            truth = webdataset.decode("pil")(webdataset.tariterators.group_by_keys(members))
            expected += [(sample["png"].tobytes(), ([sample["txt"]], None)) for sample in truth]
    assert everything(splits) == expected and len(expected) == len(DIGITS)
    assert not splits.images["train"] and len(splits.images["val"]) == len(DIGITS)
    assert splits.record()["streamed"] == list(splits.stream.shards) and len(splits.stream.shards) == 3
    assert "3 shards streamed for train, 12 val" in str(splits)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.xz"])
def test_compressed_shards_are_read_in_order(name: str, folder: Path, server: str) -> None:
    samples = [(sample.key, sample.texts) for sample in stream_shard(f"{server}/{name}")]
    assert samples == [(sample.key, sample.texts) for sample in read_shard(folder / "train-01.tar")[0]]
    cut = (folder / name).read_bytes()[:-40]
    (folder / "cut").write_bytes(cut)
    with pytest.raises(OSError, match="ended before the end-of-stream marker"):
        list(stream_shard(f"{server}/cut"))


def test_shards_that_cannot_be_read_to_their_ends(folder: Path, server: str, tmp_path: Path) -> None:
    whole = (folder / "train-01.tar").read_bytes()
    places = [place for place in range(0, len(whole), 512) if whole[place:].startswith(b"part/")]
    bad = {
        "image.tar": (whole[: places[4] + 700], 2, "unexpected end of data"),
        "header.tar": (whole[: places[4] + 100], 2, "no valid header there"),
        "broken.tar": (whole[: places[4]] + b"?" * 512 + whole[places[4] + 512 :], 2, "no valid header there"),
        "between.tar": (whole[: places[4]], 2, "the mark of its end is missing"),
        "two.tar": (whole + whole, 4, "more data follows its end"),
        "no.tar": (b"?" * 2000, 0, "no valid header there"),
        "empty.tar": (b"", 0, "it is empty"),
    }
    for name, (content, *_) in bad.items():
        (folder / name).write_bytes(content)
    skipped = SkipList(tmp_path / "skipped.txt")
    names = ",".join(name for name in bad)
    splits = streamed(f"{server}/train-00.tar::{server}/{{{names}}}::{server}/nowhere.tar::pipe:exit 3", folder)
    counts = {
        shard.rpartition("/")[2]: len(list(splits.stream.usable(shard, skipped))) for shard in splits.stream.shards
    }
    assert counts == {
        "train-00.tar": 4,
        **{name: count for name, (_, count, _) in bad.items()},
        "nowhere.tar": 0,
        "pipe:exit 3": 0,
    }
    reasons = listed(tmp_path / "skipped.txt")
    for name, (_, _, reason) in bad.items():
        assert reasons[name].startswith("the shard cannot be read: ") and reason in reasons[name]
        (folder / name).unlink()
    # Older webdataset has the whole command as one string.
    assert re.fullmatch("the shard cannot be read: curl.* ended with exit code 22", reasons["nowhere.tar"])
    assert reasons["pipe:exit 3"] == "the shard cannot be read: exit 3 ended with exit code 3"


def test_samples_are_cleaned_and_counted_as_elsewhere(folder: Path, tmp_path: Path) -> None:
    (one, _), (other, _) = DIGITS[0], DIGITS[-1]
    samples: list[tuple[str, dict[str, Any]]] = [
        ("a", {"png": png(one), "txt": "\ufeff  a caption \n"}),
        ("b", {"png": png(one), "txt": " "}),
        ("c", {"png": png(one)}),
        ("d", {"txt": "no image"}),
        ("e", {"png": png(one), "txt": b"\xff\xfea\0"}),
        ("._f", {"png": b"?", "txt": "?"}),
        ("g.h", {"png": png(one), "txt": "dots"}),
        ("i", {"PNG": png(one), "json": {"caption": [" two", "captions"]}}),
        ("j", {"png": png(one), "txt": "first"}),
        ("j", {"png": png(other), "txt": "a name again"}),
    ]
    path = write_shard(tmp_path / "x.tar", samples)
    lists = {name: SkipList(tmp_path / name / "skipped.txt") for name in ("map", "stream")}
    for skips in lists.values():
        assert skips.path
        skips.path.parent.mkdir()
    mapped = read(path, lists["map"], val_data=str(folder / "data.csv"))
    splits = streamed(str(path), folder)
    found = everything(splits, lists["stream"])
    truth = zip(mapped.images["train"], mapped.captions["train"], strict=True)
    assert found == [(pixels(image), (list(texts), None)) for image, texts in truth]
    assert [words[0] for _, words in found] == [["a caption"], ["two", "captions"], ["first"], ["a name again"]]
    hint = " (in streamed shards, the members of a sample follow each other)"
    assert {name: why.replace(hint, "") for name, why in listed(tmp_path / "stream" / "skipped.txt").items()} == listed(
        tmp_path / "map" / "skipped.txt"
    )
    assert lists["map"].changes() == lists["stream"].changes() != {}


def test_classes_are_those_of_the_validation_data(folder: Path, tmp_path: Path) -> None:
    samples = [(f"{n}", {"png": png(image), "json": {"kind": name}}) for n, (image, name) in enumerate(DIGITS)]
    samples += [("new", {"png": png(DIGITS[0][0]), "json": {"kind": "three"}})]
    path = write_shard(tmp_path / "x.tar", samples)
    skipped = SkipList(tmp_path / "skipped.txt")
    val = str(write_shard(tmp_path / "val.tar", samples[::4]))
    splits = streamed(str(path), folder, val_data=val, label_column="kind")
    assert splits.class_names == ["one", "three", "two", "zero"]
    names = [name for _, name in DIGITS]
    expected = [(pixels(image), (splits.class_names.index(name),)) for image, name in DIGITS]
    assert everything(splits, skipped)[:-1] == expected and skipped.count() == 0
    val = str(write_shard(tmp_path / "val.tar", samples[:-1:4]))
    splits = streamed(str(path), folder, val_data=val, label_column="kind")
    assert everything(splits, skipped) == [(pixels(i), (["one", "two", "zero"].index(n),)) for i, n in DIGITS]
    assert listed(tmp_path / "skipped.txt") == {"x.tar:new": "its class 'three' is not in the validation data"}
    made = splits.stream.from_classes([["a"], ["b"], ["c"]], range(3))
    assert [words for _, words in made.usable(str(path), skipped)][:1] == [(["c"], 2)] and names[0] == "zero"


def test_numbers_of_classes(folder: Path) -> None:
    splits = streamed(str(folder / "cls"), folder, val_data=str(folder / "cls" / "train-00.tar"))
    assert splits.class_names == ["0", "1", "2"]
    assert sorted(words for _, words in everything(splits)) == [(n,) for n in (0, 1, 2) for _ in range(4)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no validation data": ({"val_data": None}, "--streaming needs --data, and --val-data with images that are not"),
    "no data": ({"data": None}, "--val-data and --test-data need --data"),
    "shots": ({"shots": 4}, "--shots and --train-fraction need images that are counted"),
    "a table": ({"data": "{folder}/data.csv"}, "--streaming reads WebDataset shards .*, but --data has .*data.csv"),
    "a glob of a URL": ({"data": "{http}/*.tar"}, "spell URLs as in {000..012}"),
    "a URL of validation data": (
        {"val_data": "{http}/train-00.tar"},
        "data is read from disk only, except by --streaming",
    ),
    "a server that is not there": (
        {"data": "http://127.0.0.1:1/{0..1}.tar"},
        "0.tar cannot be read: curl.* ended with",
    ),
    "a library that is not there": ({"data": "s3://bucket/0.tar"}, "s3://bucket/0.tar cannot be read: Install s3fs"),
    "an unknown address": ({"data": "foo://bucket/0.tar"}, "cannot be read: Protocol not known: foo"),
    "classes, not captions": (
        {"data": "{folder}/cls"},
        "none of the first 4 samples has an image and a caption, as the validation data has .*there are .cls",
    ),
    "other classes": (
        {"data": "{folder}/cls", "val_data": "{folder}/classes/data.csv"},
        "its classes .* are not those of the validation data: one, two, zero",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_streamed_is_one_line(case: str, folder: Path, server: str) -> None:
    changes, reason = WRONG[case]
    options = {"data": f"{server}/train-00.tar", "val_data": str(folder / "data.csv"), "streaming": True, **changes}
    for name, value in options.items():
        if isinstance(value, str):
            options[name] = value.replace("{http}", server).replace("{folder}", str(folder))
    if options["data"] is None:
        options["data"] = "digits-pairs"
    with pytest.raises(ValueError, match=reason) as error:
        read(**options)
    assert "\n" not in str(error.value)


def test_without_webdataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="--streaming needs the package webdataset: pip install webdataset"):
        streamed(str(folder / "train-00.tar"), folder)
    assert len(read(folder / "train-00.tar").images["train"])  # not needed otherwise
