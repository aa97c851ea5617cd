"""JSON from outside: every error names the place, the key, and both types."""

from __future__ import annotations

from typing import Any

import pytest

from randlora_vision.json_values import check_object, check_type, parse_json

KINDS = {"rank": int, "alpha": float, "names": list[str] | None, "sizes": dict[str, int], "sparse": bool}
GOOD = {"rank": 3, "alpha": 2, "names": ["a"], "sizes": {"a": 1}, "sparse": False, "other": object()}


def test_an_object_that_is_right() -> None:
    found = check_object(GOOD, KINDS, "x.json")
    assert found == {key: value for key, value in GOOD.items() if key != "other"}
    assert check_object({**GOOD, "alpha": 0.5, "names": None}, KINDS, "x.json")["names"] is None
    del GOOD["names"]
    assert check_object(GOOD, KINDS, "x.json")["names"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 3.0}, "x.json: rank must be an integer, got a number"),
        ({"rank": True}, "x.json: rank must be an integer, got true or false"),
        ({"rank": "8"}, "x.json: rank must be an integer, got a string"),
        ({"rank": None}, "x.json: rank must be an integer, got null"),
        ({"alpha": False}, "x.json: alpha must be a number, got true or false"),
        ({"names": True}, "x.json: names must be a list or null, got true or false"),
        ({"names": ["a", 3]}, "x.json: names[1] must be a string, got an integer"),
        ({"names": {"a": "b"}}, "x.json: names must be a list or null, got a JSON object"),
        ({"sizes": {"a\n": 1.5}}, "x.json: sizes['a\\n'] must be an integer, got a number"),
        ({"sparse": 0}, "x.json: sparse must be true or false, got an integer"),
    ],
)
def test_a_value_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_object({**GOOD, **changes}, KINDS, "x.json")
    assert str(caught.value) == message


def test_what_is_not_an_object_or_lacks_keys() -> None:
    with pytest.raises(ValueError, match="x.json: it must be a JSON object, got a list"):
        check_object([], KINDS, "x.json")
    with pytest.raises(ValueError, match="x.json: it lacks rank, sizes"):
        check_object({"alpha": 1, "sparse": True}, KINDS, "x.json")
    with pytest.raises(ValueError, match=r"x.json: a\[0\]\[1\] must be an integer"):
        check_type([[1, "b"]], list[list[int]], "x.json", "a")


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[" * 200_000, "9" * 5000, "\x1b", "{'a': 1}"])
def test_what_is_not_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="^x.json is not valid JSON: ") as caught:
        parse_json(text, "x.json")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
