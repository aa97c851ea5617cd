"""explain.py on the runs of both scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.training_helpers import QUICK, draw_nothing, script, write_class_folders, write_tiny_clip, write_tiny_vit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_a_comparison_is_explained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_class_folders(tmp_path / "images")
    model = (write_tiny_clip if kind == "clip" else lambda folder: write_tiny_vit(folder, 3))(tmp_path / "tiny")
    words = ["--script", kind, "--model", f"local-dir:{model}", "--data", str(images), "--rank", "4", *QUICK]
    with monkeypatch.context() as context:
        draw_nothing(context)
        script("compare").main([*words, "--output-dir", str(tmp_path / "out")])
    script("explain").main([str(tmp_path / "out"), "--grid", "3", "--samples", "6"])
    out = tmp_path / "out" / "explained"
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and not re.search(r'(src|href)="(?!data:)', page)
    record = json.loads((out / "explained.json").read_text())
    ranks = record["effective rank / narrow side"]
    assert set(ranks) == {"randlora", "lora", "full"}
    assert all(ranks["lora"][name] < ranks["randlora"][name] for name in ranks["lora"])
    loss = record["loss on the plane"]["loss"]
    assert len(loss) == 3 and len(loss[0]) == 3
    assert all(0 <= value <= 1.0001 for held in record["CKA"]["base"].values() for value in held.values())


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("explain").main([str(tmp_path)])
    assert "holds no finished run" in capsys.readouterr().err
