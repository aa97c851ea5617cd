"""Names and other texts from outside, as they appear in messages."""

from __future__ import annotations

import ast
import random

import pytest

from randlora_vision.errors import printable_errors
from randlora_vision.names import counted, listing, matches_one_of, matches_suffix, printable, short_name, suffixes
from randlora_vision.training.data.split_names import images_of


def test_what_is_printable_stays() -> None:
    for text in ("", "blocks.0.attn.qkv", "größe, 画像 [x] {y} \\ 'z'"):
        assert printable(text) == text


def test_everything_else_is_escaped_and_can_be_read_back() -> None:
    """The truth is Python's own reader of escapes, for every character that it does not print itself."""
    odd = [chr(code) for code in range(0x11000) if not chr(code).isprintable()]
    assert {"\0", "\n", "\r", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\u200b", "\ud800"} <= set(odd)
    for char in random.Random(0).sample(odd, 300) + ["\n", "\x1b", "\u202e", "\ud800", "\U000e0001"]:
        shown = printable(f"a{char}b")
        assert shown.isprintable() and ast.literal_eval(f"'{shown}'") == f"a{char}b"


def test_long_texts_are_cut() -> None:
    for text in ("a" * 1_300_000, "\x1b" * 1_300_000, "\U000e0001" * 3000):
        assert len(printable(text)) <= 2000 and printable(text).isprintable()
    assert "(1,300,000 characters)" in printable("a" * 1_300_000)
    assert len(listing(["b" * 10**6] * 9)) < 1600 and listing(["a"] * 7).endswith(" and 2 more")


def test_errors_are_made_printable() -> None:
    @printable_errors
    def fail(message: str) -> None:
        raise ValueError(message)

    with pytest.raises(ValueError, match=r"^x\\x1b\[31m\\ny$"):
        fail("x\x1b[31m\ny")
    with pytest.raises(ValueError) as caught:
        fail("ü" * 10**6)
    assert len(str(caught.value)) <= 2000


def test_numbers_of_things() -> None:
    assert [counted(count, "test image") for count in (0, 1, 2)] == ["0 test images", "1 test image", "2 test images"]
    assert (counted(1, "class"), counted(3, "class")) == ("1 class", "3 classes")
    assert (images_of("all", 4), images_of("all", 1), images_of("val", 1)) == ("4 images", "1 image", "1 val image")


def test_suffixes_are_what_a_name_may_match() -> None:
    path = "blocks.0.attn.qkv"
    assert list(suffixes(path)) == [path, "0.attn.qkv", "attn.qkv", "qkv"]
    for name in ("qkv", "attn.qkv", "ttn.qkv", "attn", "", path, f"x.{path}"):
        assert matches_one_of({name}, [path]) is (bool(name) and matches_suffix(name, path))


def test_a_cached_folder_is_named_without_its_fingerprint() -> None:
    assert short_name("/cache/digits-clip-32c3eeffc095") == "digits-clip"
    assert short_name("openai/clip-vit-large-patch14") == "clip-vit-large-patch14"
