from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from randlora_vision.errors import DEBUG_VARIABLE, user_errors
from randlora_vision.train_scripts import train_classifier
from randlora_vision.train_scripts.train_clip import choose_model
from randlora_vision.training.classifier.defaults import DEFAULTS
from randlora_vision.training.classifier.options import ClassifierAdapterOptions, ClassifierOptions
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, LossOptions, ModelOptions
from randlora_vision.training.data.options import DataOptions, ImageOptions
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.harness.options import RunOptions, TrainingOptions, parse
from randlora_vision.training.harness.run_folder import plain_settings
from tests.training_helpers import clip_settings


def clip_options(*argv: str) -> ClipOptions:
    return parse(ClipOptions, argv, "A test.")


def test_without_arguments_everything_has_its_default() -> None:
    assert clip_options() == ClipOptions()


def test_flags_reach_their_groups() -> None:
    options = clip_options("--method", "lora", "--rank", "4", "--lr", "1e-3", "--overwrite", "--towers", "text")
    assert options.adapter == ClipAdapterOptions(method="lora", rank=4)
    assert options.training == TrainingOptions(lr=1e-3)
    assert options.run == RunOptions(overwrite=True)
    assert options.clip == ModelOptions(towers="text")


def test_several_values_make_a_tuple() -> None:
    options = clip_options("--target-modules", "c_fc", "c_proj", "--templates", "a {}", "the {}.")
    assert options.adapter.target_modules == ("c_fc", "c_proj")
    assert options.images.templates == ("a {}", "the {}.")


def test_help_names_flags_defaults_and_the_odd_meaning_of_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        clip_options("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--gradient-accumulation-steps" in text
    assert "a LARGER rank means FEWER trained numbers" in text
    assert "(default: 0.01)" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--rnak", "3"], "Unrecognized options: --rnak, 3. Perhaps you meant --rank."),
        (["--rnak", "3", "--ovrwrite"], "Perhaps you meant --overwrite or --rank."),
        (["--method", "lorra"], "invalid choice 'lorra' for argument '--method'"),
        (["--rank", "abc"], "--rank"),
        (["--rank"], "--rank"),
        (["--rank", "0"], "--rank must be 1 or more, got 0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--max-grad-norm", "-1"], "--max-grad-norm must be 0 or more, got -1.0"),
        (["--warmup-fraction", "1"], "--warmup-fraction must be at least 0 and below 1"),
        (["--val-fraction", "1"], "--val-fraction must be above 0 and below 1"),
        (["--templates", "a photo"], "'a photo' has no {} for the class name"),
        (["--dropout", "0.1", "--method", "full"], "--dropout needs --method randlora"),
        (["--budget", "100"], "--budget chooses the rank of --method lora"),
        (["--method", "lora", "--budget", "100", "--rank", "2"], "give only one"),
        (["--towers", "text", "--target-modules", "c_fc"], "give only one"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_mistakes_are_one_line(argv: list[str], expected: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # tyro reads these: it draws a frame, in colour or not, or no frame.
    stdout = SimpleNamespace(encoding="utf-8" if terminal else "ascii", isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError) as mistake:
        clip_options(*argv)
    message = str(mistake.value)
    assert expected in message
    unwanted = ("\n", "│", "---", "\x1b", "Parsing error", "Value error", "Error parsing adapter")
    assert not any(mark in message for mark in unwanted)


def test_resolving_fills_in_what_depends_on_method_and_data() -> None:
    demo = clip_settings(ClipOptions())
    assert demo.adapter.rank == 16 and demo.adapter.alpha == 320
    assert demo.training.steps == 250 and demo.training.lr == 2e-3
    assert len(demo.images.templates) == 5

    options = ClipOptions(images=ImageOptions(data="folder"), training=TrainingOptions(lr=1e-3))
    own = clip_settings(options)
    assert own.adapter.rank == 32 and own.training.steps == 1000
    assert own.images.templates == ("a photo of a {}.",)
    chosen = choose_model(options)
    assert chosen.model == "ViT-B-32" and chosen.pretrained


def test_resolving_keeps_what_was_given() -> None:
    given = ClipOptions(
        clip=ModelOptions(model="RN50", pretrained="openai"),
        images=ImageOptions(data="folder", templates=("{}",)),
        loss=LossOptions("class-prompts"),
        adapter=ClipAdapterOptions(method="lora", rank=3, alpha=7.0),
        training=TrainingOptions(steps=5, lr=0.5),
    )
    assert plain_settings(clip_settings(given)) == plain_settings(given)


def test_the_demo_model_takes_no_other_weights() -> None:
    with pytest.raises(ValueError, match="--pretrained needs --model"):
        ClipOptions(clip=ModelOptions(pretrained="openai"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataset", "torch/cifar10"], {"data": "timm:torch/cifar10"}),
        (["--steps", "3", "--dataset=hfds/a/b"], {"data": "timm:hfds/a/b"}),
        (["--dataset_download", "--dataset", "x"], {"data": "timm:x", "download": True}),
        ({"dataset": "torch/cifar10", "dataset_download": True}, {"data": "timm:torch/cifar10", "download": True}),
        ({"dataset": None, "dataset_download": False}, {}),
    ],
)
def test_options_of_an_earlier_version_are_understood(words: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    if isinstance(words, dict):
        (tmp_path / "old.yaml").write_text(yaml.safe_dump({"data": words}))
        words = ["--config", str(tmp_path / "old.yaml")]
    assert parse(ClassifierOptions, words, "A test.", train_classifier.TIMM).data == DataOptions(**expected)


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_help_exits_without_an_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(DreamBoothOptions, ["--steps", "3", flag], "A test.")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--method {randlora,lora,full}  (default: randlora)" in text
    assert ("  --logit-mean FLOAT  (default: 0.0)" in text) == (flag == "--help-all")


def test_a_rank_below_the_default_is_noted() -> None:
    given = {"data": DataOptions("folder")}
    small = ClassifierOptions(**given, adapter=ClassifierAdapterOptions(rank=8))
    assert "--rank 8 trains MORE numbers than the usual 32" in DEFAULTS.rank_note(small.adapter, small.embedded)
    for adapter in (
        ClassifierAdapterOptions(),
        ClassifierAdapterOptions(rank=32),
        ClassifierAdapterOptions(method="lora", rank=4),
    ):
        options = ClassifierOptions(**given, adapter=adapter)
        assert DEFAULTS.rank_note(options.adapter, options.embedded) == ""


@pytest.mark.parametrize("error", [ValueError("no\n  good"), FileNotFoundError("no good")])
def test_user_errors_are_one_line_and_exit_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @user_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: no good\n"


def test_a_loader_processs_traceback_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    @user_errors
    def main() -> None:
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "x.py", line 1, in f\nValueError: cannot read the image a.png: broken\n'
        )

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: cannot read the image a.png: broken\n"


def test_torchruns_summary_has_the_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @user_errors
    def main() -> None:
        raise ValueError("no good")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        main()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert "error: no good" in str(ChildFailedError("main", {0: failure}))


def test_bugs_keep_their_traceback_and_so_do_user_errors_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    @user_errors
    def main(error: Exception) -> None:
        raise error

    with pytest.raises(KeyError):
        main(KeyError("bug"))
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError):
        main(ValueError("wrong"))
