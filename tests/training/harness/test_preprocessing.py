"""How images are prepared stays the same in a resumed run and in an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from randlora_vision.files.atomic import write_json
from randlora_vision.training.harness.preprocessing import check_preprocessing

KEPT = {"evaluation": {"size": (32, 32), "mean": [0.5]}, "training": {"hflip": 0.5, "auto_augment": None}}


def test_images_that_are_prepared_in_another_way(tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.json"
    check_preprocessing(path, {"evaluation": {"size": 1}}, "a run of an older version has no such file")
    write_json(path, KEPT)
    check_preprocessing(path, KEPT, "")
    check_preprocessing(path, {"evaluation": KEPT["evaluation"]}, "")
    now = {"evaluation": {"size": [32, 32], "std": [1.0]}, "training": {"hflip": 0, "auto_augment": None}}
    with pytest.raises(ValueError) as error:
        check_preprocessing(path, now, "give --x")
    differences = "mean was [0.5], now None; std was None, now [1.0]; hflip was 0.5, now 0"
    assert str(error.value) == f"images are not prepared as in {path}: {differences}; give --x"
    path.write_text('{"evaluation": []}')
    with pytest.raises(ValueError, match="preprocessing.json: it lacks training"):
        check_preprocessing(path, KEPT, "")
