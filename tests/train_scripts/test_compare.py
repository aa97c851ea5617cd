"""compare.py: every method of a script, seeds, rates, going on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.training.data.sources import digits
from randlora_vision.training.dreambooth import task as dreambooth_task
from tests.tiny_pipelines import shallow_sd15
from tests.training_helpers import (
    QUICK,
    as_in_a_new_process,
    draw_nothing,
    script,
    write_class_folders,
    write_tiny_clip,
    write_tiny_vit,
)

SUBJECT = ("--pretrained-model-name-or-path", "a", "--instance-data-dir", "b", "--instance-prompt", "c")


@pytest.fixture
def compare() -> Any:
    as_in_a_new_process()
    return script("compare")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images") / "data")


@pytest.mark.slow
def test_all_methods_of_clip_with_equal_numbers(
    compare: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_clip(tmp_path / "tiny")
    words = ["--model", f"local-dir:{model}", "--data", str(images), "--rank", "2", *QUICK]
    draw_nothing(monkeypatch)  # tests/training/evaluation/test_figures.py draws the comparison
    compare.main(["--methods", "lora", "dora", "randlora", "full", "--output-dir", str(tmp_path / "out"), *words])
    printed = capsys.readouterr().out
    summaries = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(summaries) == ["randlora", "lora", "dora", "full"]
    numbers = {method: runs[0]["trained_numbers"] for method, runs in summaries.items()}
    assert all(abs(numbers[method] - numbers["randlora"]) < 0.25 * numbers["randlora"] for method in ("lora", "dora"))
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert all(label in table and label in printed for label in ("RandLoRA", "LoRA", "DoRA", "full fine-tuning"))
    assert (tmp_path / "out" / "comparison.png").is_file()


@pytest.mark.slow
def test_rates_and_seeds_of_the_classifier_and_going_on_after_a_stop(
    compare: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_vit(tmp_path / "tiny", 3)
    draw_nothing(monkeypatch)
    words = ["--script", "classifier", "--model", f"local-dir:{model}", "--data", str(images), *QUICK]
    words += ["--methods", "linear-probe", "--rates", "linear-probe=1e-9,1e-1", "--seeds", "3", "4", "--go-on"]
    words += ["--output-dir", str(tmp_path / "out")]
    compare.main(words)
    folders = sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("summary.json"))
    assert len(folders) == 3 and folders[0].startswith("linear-probe/lr-") and "seed-3" in folders[0]
    first = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "±" in (tmp_path / "out" / "comparison.md").read_text()
    (tmp_path / "out" / folders[0]).unlink()  # as if it had been stopped
    capsys.readouterr()
    compare.main(words)
    assert capsys.readouterr().out.count("kept:") == 2
    again = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["after"] for run in again["linear-probe"]] == [run["after"] for run in first["linear-probe"]]
    compare.main([*words, "--batch-size", "4", "--seeds", "3"])
    assert "kept:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "lora"], "leave --method, --lr and --seed out"),
        (["--lr", "1"], "--rates METHOD=RATE"),
        (["--resume", "latest"], "give --go-on instead"),
        (["--eval-only"], "leave --eval-only and --adapter out"),
        (["--script", "classifier", "--methods", "nola"], "train_classifier.py has no nola"),
        (["--script", "dreambooth", "--methods", "vera"], "train_dreambooth.py has no vera"),
        (["--script", "dreambooth", "--dry-run"], "the comparison trains: for --dry-run"),
        (["--script", "dreambooth", *SUBJECT], "nothing would measure what is lost of other prompts"),
        (
            ["--script", "dreambooth", *SUBJECT, "--prior-prompt", "a", "--num-prior-images", "0"],
            "needs --num-prior-images",
        ),
        (["--rates", "dora=1e-3"], "dora is not among --methods"),
        (["--rates", "lora=fast"], "expected METHOD=RATE"),
    ],
)
def test_what_cannot_be_compared(
    compare: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_has_both_groups_of_options(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    printed = capsys.readouterr().out
    assert "--seeds SEED" in printed and "--data" in printed


@pytest.mark.slow
def test_dreambooth_with_loras_of_the_same_size(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow_sd15().save_pretrained(tmp_path / "sd15")
    (tmp_path / "subject").mkdir()
    picture: Any = digits.read_digits((7,)).images["train"][0]
    picture.save(tmp_path / "subject" / "1.png")
    draw_nothing(monkeypatch)
    monkeypatch.setattr(dreambooth_task, "_MEASURED", 2)
    words = ["--script", "dreambooth", "--pretrained-model-name-or-path", str(tmp_path / "sd15"), "--go-on"]
    words += ["--instance-data-dir", str(tmp_path / "subject"), "--instance-prompt", "a photo of sks digit"]
    words += ["--prior-prompt", "a dog", "--num-prior-images", "1", "--resolution", "16", "--num-inference-steps", "2"]
    words += [
        "--rank",
        "4",
        "--batch-size",
        "1",
        "--steps",
        "1",
        "--report-to",
        "none",
        "--methods",
        "randlora",
        "lora",
    ]
    compare.main([*words, "--rates", "lora=1e-3,1e-2", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    summaries = json.loads((tmp_path / "out" / "comparison.json").read_text())
    numbers = {method: runs[0]["trained_numbers"] for method, runs in summaries.items()}
    assert abs(numbers["lora"] - numbers["randlora"]) < 0.25 * numbers["randlora"]
    losses = [json.loads(path.read_text())["after"]["loss"] for path in tmp_path.glob("out/lora/*/summary.json")]
    assert len(losses) == 2 and summaries["lora"][0]["after"]["loss"] == min(losses)
    assert "loss on the subject" in printed and "pixel drift of other prompts" in printed
