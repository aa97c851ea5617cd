"""Tables and captions beside images: quotes, byte order marks, encodings, and what belongs to no image."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from randlora_vision.training.data.class_names import read_templates, with_class_names
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.subject import read_subject
from tests.data_helpers import listed, png, read, write_images, write_shard, write_text

IMAGES = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(8)]
CAPTIONS = ['"sit" is what it does', 'a "cat"', '"', 'it is 5" long', "plain", '""', "'single'", '"quoted" twice "so"']


def captions_of(splits: object) -> dict[str, list[str]]:
    pairs = [
        (image, texts)
        for split in splits.images  # type: ignore[attr-defined]
        for image, texts in zip(splits.images[split], splits.captions[split], strict=True)  # type: ignore[attr-defined]
    ]
    return {Path(str(image)).name: list(texts) for image, texts in pairs}


def test_quotes_between_tabs_are_characters(tmp_path: Path) -> None:
    names = write_images(tmp_path, IMAGES)
    lines = ["filepath\ttitle", *(f"{n}\t{c}" for n, c in zip(names, CAPTIONS, strict=True))]
    skipped = SkipList(tmp_path / "skipped.txt")
    found = captions_of(read(write_text(tmp_path / "x.tsv", "\n".join(lines)), skipped))
    expected = {n: [c] for n, c in zip(names, CAPTIONS, strict=True) if c != '""'}  # two quotes are an empty value
    assert found == expected and skipped.count() == 1


def test_quotes_that_a_writer_of_tables_adds_are_removed(tmp_path: Path) -> None:
    """Both with tabs and with commas, as Python's csv module writes them."""
    names = write_images(tmp_path, IMAGES)
    for delimiter, quoting in (("\t", csv.QUOTE_MINIMAL), ("\t", csv.QUOTE_ALL), (",", csv.QUOTE_MINIMAL)):
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=delimiter, quoting=quoting)
        writer.writerows([("image", "text"), *zip(names, CAPTIONS, strict=True)])
        path = write_text(tmp_path / ("x.tsv" if delimiter == "\t" else "x.csv"), stream.getvalue())
        assert captions_of(read(path)) == {n: [c] for n, c in zip(names, CAPTIONS, strict=True)}


def test_rows_that_a_quote_joins_are_counted(tmp_path: Path) -> None:
    names = write_images(tmp_path, IMAGES)
    lines = ["image,text", *(f"{name},a" for name in names)]
    lines[2] = f'{names[1]},"a'
    lines[4] = f'{names[3]},a"'
    skipped = SkipList(tmp_path / "skipped.txt")
    found = captions_of(read(write_text(tmp_path / "x.csv", "\n".join(lines)), skipped))
    assert len(found) == 6 and skipped.changes() == {"a quoted value of several lines was read": 1}
    assert "x.csv:5" in (tmp_path / "changed.txt").read_text()
    lines[4] = f"{names[3]},a"
    with pytest.raises(ValueError, match="x.csv:9 is not a readable row .is a quote missing"):
        read(write_text(tmp_path / "x.csv", "\n".join(lines)))


TEXTS = {  # bytes that are not UTF-8 text, and the encoding that the error names
    "cp1252": ("caf\u00e9", "cp1252", "WINDOWS-1252"),
    "utf-16": ("caf\u00e9", "utf-16", "UTF-16"),
    "utf-16 without a mark": ("cafe", "utf-16-le", "UTF-16"),
    "utf-32": ("cafe", "utf-32", "UTF-32"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_other_encodings_name_the_file_and_the_remedy(case: str, tmp_path: Path) -> None:
    word, encoding, named = TEXTS[case]
    remedy = f"iconv -f {named} -t UTF-8"

    def content(text: str) -> bytes:
        return text.format(word).encode(encoding)

    names = write_images(tmp_path, IMAGES[:2])
    for path, text in (
        (tmp_path / "x.csv", "image,text\n000.png,{}\n"),
        (tmp_path / "x.tsv", "image\ttext\n000.png\t{}\n"),
    ):
        with pytest.raises(ValueError, match=f"{path.name} is not UTF-8 text.*{remedy}"):
            read(write_text(path, content(text)))
    splits = ImageSplits(name="x", class_names=["a"], images={"train": IMAGES[:1]}, labels={"train": [0]}, origin="")
    for name in ("names.txt", "names.json", "names.csv"):
        path = write_text(tmp_path / name, content('["{}"]'.replace("{}", "{0}")))
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text.*{remedy}"):
            with_class_names(splits, str(path))
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text.*{remedy}"):
            read_templates([str(path)])
    for name in ("000.txt", "metadata.jsonl", "metadata.csv"):
        beside = write_text(tmp_path / name, content("{}"))
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text.*{remedy}"):
            read_subject(SubjectOptions(instance_data_dir=str(tmp_path), instance_prompt="x"), SkipList())
        beside.unlink()
    members = [(f"{n}", {"png": png(IMAGES[n]), "txt": "good"}) for n in range(3)]
    members.append(("bad", {"png": png(IMAGES[3]), "txt": content("{}")}))  # type: ignore[dict-item]
    skipped = SkipList(tmp_path / "skipped.txt")
    assert len(captions_of(read(write_shard(tmp_path / "x.tar", members), skipped))) == 3
    assert remedy in listed(tmp_path / "skipped.txt")["x.tar:bad"]
    assert names


def test_a_byte_order_mark_is_not_part_of_any_text(tmp_path: Path) -> None:
    names = write_images(tmp_path, IMAGES[:3])
    mark = b"\xef\xbb\xbf"
    for name in names:
        write_text((tmp_path / name).with_suffix(".txt"), mark + b"a cat\n")
    rows = "".join(f"{name},a cat\n" for name in names)
    shard = write_shard(tmp_path / "x.tar", [(n, {"png": png(IMAGES[n]), "txt": mark + b"a cat"}) for n in range(3)])  # type: ignore[arg-type, misc]
    table = write_text(tmp_path / "x.csv", mark + b"image,text\n" + rows.encode())
    for source in (table, shard, tmp_path):
        assert list(captions_of(read(source)).values()) == [["a cat"]] * 3
    classes = write_text(tmp_path / "c.txt", mark + b"tabby\nterrier")
    splits = ImageSplits(
        name="x", class_names=["cat", "dog"], images={"train": IMAGES[:2]}, labels={"train": [0, 1]}, origin=""
    )
    assert with_class_names(splits, str(classes)).class_names == ["tabby", "terrier"]


def test_pipes_are_refused(tmp_path: Path) -> None:
    for name in ("x.csv", "x.tar", "names.txt"):
        os.mkfifo(tmp_path / name)
    for name in ("x.csv", "x.tar"):
        with pytest.raises((ValueError, OSError), match=f"{name}.*not a regular file|no shard found"):
            read(tmp_path / name)
    with pytest.raises(OSError, match="names.txt is not a regular file"):
        with_class_names(
            ImageSplits(name="x", class_names=["a"], images={}, labels={}, origin=""), str(tmp_path / "names.txt")
        )
    names = write_images(tmp_path, IMAGES[:3])
    os.mkfifo(tmp_path / "pipe.png")
    rows = [f"{name},a" for name in [*names, "pipe.png"]]
    skipped = SkipList(tmp_path / "skipped.txt")
    read(write_text(tmp_path / "y.csv", "\n".join(["image,text", *rows])), skipped)
    assert "not a regular file" in listed(tmp_path / "skipped.txt")["pipe.png"]


# Captions beside images


def test_captions_of_other_tools_and_captions_without_an_image(tmp_path: Path) -> None:
    write_images(tmp_path, IMAGES)
    for name, text in (("000.txt", "of 0\n"), ("001.caption", "of 1"), ("002.TXT", "of 2"), ("003.png.txt", "of 3")):
        (tmp_path / name).write_text(text)
    write_text(
        tmp_path / "metadata.csv", 'file_name,text\n004.png,"of 4, too"\n000.png,no\nnowhere.png,x\n004.png,4 again\n'
    )
    write_text(tmp_path / "metadata.jsonl", json.dumps({"file_name": "005.png", "caption": "of 5"}))
    (tmp_path / "orphan.txt").write_text("no image")
    skipped = SkipList(tmp_path / "skipped.txt")
    subject = read_subject(SubjectOptions(instance_data_dir=str(tmp_path), instance_prompt="all"), skipped)
    assert subject.captions == ["of 0", "of 1", "of 2", "of 3", "of 4, too", "4 again", "of 5", "all", "all"]
    assert set(listed(tmp_path / "skipped.txt")) == {"orphan.txt", "metadata.csv:4"}
    found = captions_of(read(tmp_path, SkipList()))
    expected = [f"of {n}" for n in range(4)] + ["of 4, too", "of 5"]
    assert found == {f"{n:03}.png": [text, "4 again"] if n == 4 else [text] for n, text in enumerate(expected)}
