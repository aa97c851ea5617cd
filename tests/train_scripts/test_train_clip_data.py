"""End-to-end tests of train_clip.py on every kind of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.data_helpers import mnist, parquet, saved, shards, table, write_images, write_text
from tests.training_helpers import draw_nothing, run_script, script, write_tiny_clip, write_tiny_vit

FLAGS = ["--steps", "2", "--batch-size", "4", "--eval-every", "2", "--rank", "4", "--report-to", "none"]
SOURCES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "csv of classes": (lambda folder: table(folder, "label"), ["--shots", "2"]),
    "shards of classes": (
        lambda folder: (write_text(folder / "names.txt", "zero\none\ntwo"), shards(folder, "cls"))[1],
        ["--templates", "simple", "--class-names", "{tmp}/names.txt"],
    ),
    "torchvision": (mnist, ["--data-root", "{tmp}", "--train-fraction", "0.4"]),
    "dataset of classes": (lambda folder: parquet(folder, "label"), ["--data-root", "{tmp}/cache"]),
    "csv of captions": (table, ["--caption-column", "caption", "--workers", "0"]),
    "shards of captions": (shards, ["--val-fraction", "0.3", "--loss", "siglip"]),
    "saved dataset of captions": (saved, []),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Any:
    def main(data: Any, *argv: str) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):  # as in a separate process
            state._shared_state.clear()
        folder = tmp_path / "run"
        argv = tuple(word.replace("{tmp}", str(tmp_path)) for word in argv)
        flags = ["--model", f"local-dir:{tiny}", "--output-dir", str(folder), *FLAGS, *argv]
        script("train_clip").main(["--data", str(data), *flags])
        return folder

    return main


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_on(
    source: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)  # test_what_was_skipped_and_cut_is_reported draws captions, the embedded defaults classes
    write, argv = SOURCES[source]
    folder = train(write(tmp_path), *argv)
    split = json.loads((folder / "split.json").read_text())
    assert len(split["held_out"]["val"]) == split["sizes"]["val"] > 0
    assert ("class_names" in split) == ("caption" not in source)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"][-1] == 2
    assert (folder / "adapter.safetensors").is_file()
    assert "results: " in capsys.readouterr().out
    if "--shots" in argv or "--train-fraction" in argv:
        assert len(split["chosen"]) == split["sizes"]["train"]
        assert max(split["chosen"]) >= len(split["chosen"])  # indices into the whole split, not into the subset


def test_what_was_skipped_and_cut_is_reported(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path)
    text = path.read_text().splitlines()
    text[1] = text[1].partition(",")[0] + "," + "so many words " * 10
    text[2] = text[2].partition(",")[0] + ", "
    path.write_text("\n".join([*text, "nowhere.png,words"]))
    folder = train(path)
    printed = capsys.readouterr().out
    assert "skipped 2" in printed and "skipped.txt" in printed
    assert "1 caption truncated to the model's context" in printed
    assert json.loads((folder / "summary.json").read_text())["truncated_captions"] == 1


def test_classes_without_words_are_refused(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--eval-only"]):
        with pytest.raises(SystemExit):
            train(shards(tmp_path, "cls"), *argv)
        assert "have no names for prompts, only 0, 1, 2: give --class-names FILE" in capsys.readouterr().err


def test_bad_data_is_one_line(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, [])
    with pytest.raises(SystemExit) as stop:
        train(table(tmp_path), "--caption-column", "words")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no column 'words' (--caption-column); it has filepath, caption" in error


@pytest.mark.parametrize("kind", ["txt", "cls"])
def test_streamed_shards(
    kind: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve images are an epoch of three steps; step 4 is the first of the second epoch."""
    pytest.importorskip("webdataset")
    draw_nothing(monkeypatch)
    val = str(shards(tmp_path / "val", kind, count=1))
    loss = ["--loss", "clip", "--class-names", str(write_text(tmp_path / "names.txt", "zero\none\ntwo"))]
    argv = ["--streaming", "--val-data", val, "--steps", "6", "--train-num-samples", "12", "--eval-every", "3"]
    argv += ["--checkpoint-every", "4", "--workers", "0", *(loss if kind == "cls" else [])]
    url = f"file://{shards(tmp_path / 'train', kind)}"
    folder = train(url, *argv)
    printed = capsys.readouterr().out
    assert "3 shards streamed for train, 12 val" in printed
    whole = (folder / "adapter.safetensors").read_bytes()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    if kind == "cls":
        return
    train(url, *argv, "--resume", "latest")  # from step 4
    assert (folder / "adapter.safetensors").read_bytes() == whole
    with pytest.raises(SystemExit):
        train(url, *argv, "--resume", "latest", "--workers", "2")
    assert "workers that read shards was 1, is now 2" in capsys.readouterr().err


def test_a_classifier_on_streamed_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    draw_nothing(monkeypatch)
    vit = write_tiny_vit(tmp_path / "vit", classes=3)
    argv = ["--streaming", "--train-num-samples", "6", "--label-column", "kind", "--rank", "4", "--report-to", "none"]
    argv += [
        "--data",
        f"pipe:cat {shards(tmp_path / 'train', 'key')}",
        "--val-data",
        shards(tmp_path / "val", "key", 1),
    ]
    run_script("train_classifier", ["--model", f"local-dir:{vit}", "--output-dir", str(tmp_path / "run"), *argv], {})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["after"]["validation"]["samples"] == 12
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["epoch_images"] == 6
    with pytest.raises(SystemExit):
        run_script("train_classifier", [*argv[:1], *argv[3:]], {})
    assert "--streaming counts no images: give --train-num-samples" in capsys.readouterr().err
