from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, ModelOptions
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.harness.options import RunOptions, TrainingOptions, parse
from randlora_vision.training.harness.run_folder import plain_settings
from tests.training_helpers import clip_settings


def parsed(tmp_path: Path, text: str, *flags: str) -> ClipOptions:
    (tmp_path / "file.yaml").write_text(text)
    return parse(ClipOptions, ["--config", str(tmp_path / "file.yaml"), *flags], "A test.")


def test_a_file_sets_options_and_flags_override_it(tmp_path: Path) -> None:
    text = """
        training: {lr: 1e-3, steps: 7, mixed_precision: "no"}
        adapter:
          target_modules: [c_fc, c_proj]
          dropout: 0
        run: {overwrite: true, output_dir: null}
        images: {templates: ["a {}", "the {}"], strict_data: false}
    """
    assert parsed(tmp_path, text) == ClipOptions(
        training=TrainingOptions(lr=1e-3, steps=7),
        adapter=ClipAdapterOptions(target_modules=("c_fc", "c_proj")),
        run=RunOptions(overwrite=True),
        images=ImageOptions(templates=("a {}", "the {}")),
    )
    flags = ["--steps", "9", "--no-overwrite", "--target-modules", "attn", "--templates", "b {}"]
    assert parsed(tmp_path, text, *flags) == ClipOptions(
        training=TrainingOptions(lr=1e-3, steps=9),
        adapter=ClipAdapterOptions(target_modules=("attn",)),
        images=ImageOptions(templates=("b {}",)),
    )


@pytest.mark.parametrize("text", ["", "training:\n  steps: 3\n"])
def test_the_file_may_follow_the_flags(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    options = parse(ClipOptions, ["--steps", "5", f"--config={tmp_path}/file.yaml"], "A test.")
    assert options.training.steps == 5


@pytest.mark.parametrize(
    "options",
    [
        ClipOptions(),
        ClipOptions(
            clip=ModelOptions(model="RN50", train_logit_scale=True, towers="vision"),
            images=ImageOptions(data="a folder", templates=("a 'b' {}", "{}: c")),
            adapter=ClipAdapterOptions(method="full"),
            training=TrainingOptions(lr=1e-7, optimizer="lion", schedule="constant", ema_decay=0.99),
            run=RunOptions(output_dir="x y", overwrite=True),
        ),
        ClipOptions(adapter=ClipAdapterOptions(method="lora", rank=3), training=TrainingOptions(seed=4)),
    ],
)
def test_what_a_run_writes_gives_its_options_back(options: ClipOptions, tmp_path: Path) -> None:
    resolved = plain_settings(clip_settings(options))
    again = parsed(tmp_path, yaml.safe_dump(resolved, sort_keys=False))
    assert plain_settings(again) == resolved == plain_settings(clip_settings(again))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainin: {lr: 1}", "there is no group of options 'trainin'; close matches: training"),
        ("{lr: 1, run: {overwrite: true}}", "there is no group of options 'lr'; it belongs under training:"),
        ("learning_rat: 1", "there is no option 'learning_rat'; close matches: learning_rate"),
        ("training: {learning_rat: 1, lr: 2}", "there is no option training: learning_rat; "),
        ("training: {batchsize: 1}", "there is no option training: batchsize; close matches: batch_size"),
        ("training: {rank: 1}", "there is no option training: rank; rank belongs under adapter:"),
        ("training: 3", "training: expected options \\(steps, .*found 3"),
        ("- a", "expected groups of options"),
        ("training: {steps: true}", "steps cannot be True"),
        ("run: {overwrite: 1}", "overwrite cannot be 1"),
        ("training: {lr: {a: 1}}", "lr cannot be {'a': 1}"),
        ("training: {steps: abc}", "--steps"),
        ("training: {steps: 0}", "--steps must be 1 or more, got 0"),
        ("a: [", "file.yaml cannot be read"),
        ("config: x", "there is no option 'config'"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        parsed(tmp_path, text)


def test_a_file_may_be_a_flat_list_of_flags(tmp_path: Path) -> None:
    text = (
        "{learning_rate: 1e-3, epochs: 2, overwrite: true, output_dir: null, templates: ['a {}'], strict_data: false}"
    )
    assert parsed(tmp_path, text, "--steps", "7") == ClipOptions(
        training=TrainingOptions(lr=1e-3, steps=7),
        run=RunOptions(overwrite=True),
        images=ImageOptions(templates=("a {}",)),
    )


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config .*none.yaml cannot be read: .*No such file"):
        parse(ClipOptions, ["--config", str(tmp_path / "none.yaml")], "A test.")


def test_the_flag_is_in_the_help_and_its_mistakes_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ClipOptions, ["--help"], "A test.")
    assert "--config" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Perhaps you meant .*--config"):
        parse(ClipOptions, ["--confg", "x"], "A test.")
    with pytest.raises(ValueError, match="--config"):
        parse(ClipOptions, ["--config"], "A test.")
