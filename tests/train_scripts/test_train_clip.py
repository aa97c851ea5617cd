"""Tests of train_clip.py, run as a user would run it."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from randlora_vision import load_adapter
from randlora_vision.demos import clip as demo_clip
from randlora_vision.demos import pretraining
from randlora_vision.demos.pretraining import Pretraining
from randlora_vision.training.clip.classifier import ClipClassifier
from randlora_vision.training.evaluation.accuracy import Scores
from tests.training_helpers import (
    TINY_CONFIG,
    Killed,
    card_scope,
    draw_nothing,
    printed_code,
    read_once,
    run_script,
    script,
    tiny_clip,
    write_class_folders,
    write_tiny_clip,
)

RUN_FILES = {
    "README.md",
    "adapter.safetensors",
    "adapter_best.safetensors",
    "config.yaml",
    "confusion.png",
    "curves.png",
    "environment.json",
    "logs",
    "metrics.jsonl",
    "preprocessing.json",
    "predictions.png",
    "split.json",
    "summary.json",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def train(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return train_clip.main with defaults for the tiny model and folder; `argv` overrides them."""
    draw_nothing(monkeypatch)

    def main(*argv: str) -> Path:
        defaults = {"--model": f"local-dir:{tiny}", "--data": str(images), "--output-dir": str(tmp_path / "run")}
        run_script("train_clip", argv, {**defaults, "--rank": "4"})
        return tmp_path / "run"

    return main


@pytest.fixture(scope="module")
def plain(tiny: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the defaults of `train`."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    defaults = {"--model": f"local-dir:{tiny}", "--data": str(images), "--output-dir": str(folder), "--rank": "4"}
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        run_script("train_clip", (), defaults)
    return folder


def test_a_run_on_class_folders(train: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("--bases", "normal")
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    printed = capsys.readouterr().out
    assert "attn.in_proj_weight" in printed  # the injection report
    assert "equal outputs (largest difference of a logit: 0.0e+00)" in printed
    assert f"load_adapter(model, '{folder}/adapter.safetensors')" in printed
    assert f"results: {folder}" in printed
    scope: dict[str, Any] = {}
    exec(printed_code(printed), scope)
    clip = tiny_clip(tiny)
    load_adapter(clip.model, folder / "adapter.safetensors")
    expected = ClipClassifier(clip, ["one", "two", "zero"], scope["templates"]).predict(scope["picture"])
    assert scope["answers"] == ["one", "two", "zero"]
    torch.testing.assert_close(scope["logits"], expected)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "randlora" and summary["steps"] == 3
    assert summary["file_bytes"] == (folder / "adapter.safetensors").stat().st_size
    assert summary["file_bytes"] <= 4 * summary["trained_numbers"] + 16_384
    ends = [summary[when]["validation"] for when in ("before", "after")]  # there is no test split
    assert [set(end) for end in ends] == [{"top1", "loss", "samples"}] * 2
    for when, end in zip(("before", "after"), ends, strict=True):
        low, high = summary["confidence"][when]["validation"]["top1"]
        assert 0 <= low <= end["top1"] <= high <= 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["adapter"]["bases"] == "normal"
    assert json.loads((folder / "split.json").read_text())["class_names"] == ["one", "two", "zero"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        split: [line["step"] for line in lines if line["split"] == split] for split in ("train", "val", "validation")
    }
    assert steps == {"train": [1, 2, 3], "val": [0, 2, 3], "validation": [0, 3]}


@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_a_rate_that_is_too_high_is_said(
    kind: str, train: Any, captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(captions), "--loss", "clip"] if kind == "captions" else []
    warning = summary_of(train(*data, "--method", "full", "--lr", "3"))["warning"]
    assert warning.startswith("the model answers ") and "for all " in warning
    assert capsys.readouterr().out.count(f"WARNING: {warning}\n") == 1


def test_the_adapter_alone_gives_the_accuracy_back(plain: Path, tiny: Path) -> None:
    summary = json.loads((plain / "summary.json").read_text())
    clip = tiny_clip(tiny)
    load_adapter(clip.model, plain / "adapter.safetensors")
    held_out = [Path(name) for name in json.loads((plain / "split.json").read_text())["held_out"]["val"]]
    labels = [["one", "two", "zero"].index(path.parent.name) for path in held_out]
    pictures = torch.stack([clip.eval_transform(Image.open(path)) for path in held_out])
    classifier = ClipClassifier(clip, ["one", "two", "zero"], ["a photo of a {}."])
    accuracy = classifier.scores([{"images": pictures, "labels": torch.tensor(labels)}]).values
    assert accuracy["top1"] == summary["after"]["validation"]["top1"]
    assert accuracy["loss"] == pytest.approx(summary["after"]["validation"]["loss"], rel=1e-4)


def test_another_seed_gives_another_adapter(train: Any, plain: Path) -> None:
    """The same seed gives the same: see test_a_runs_own_config_repeats_it."""
    first, other = (load_file(folder / "adapter.safetensors") for folder in (plain, train("--seed", "1")))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "7", "--log-every", "5", "--eval-every", "4", "--dropout", "0.1"]
    flags += ["--templates", "a {}", "the {}", "--towers", "both", "--checkpoint-every", "3", "--ema-decay", "0.9"]
    straight = train(*flags, "--output-dir", str(tmp_path / "straight")).parent / "straight"

    scores = ClipClassifier.scores

    def killed(self: ClipClassifier, batches: Any) -> Scores:
        checkpoints = [path.name for path in (tmp_path / "killed").glob("checkpoints/*")]
        if "step-000003" in checkpoints:  # i.e. in the evaluation at step 4
            raise Killed
        return scores(self, batches)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ClipClassifier, "scores", killed)
        train(*flags, "--output-dir", str(folder))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "val", "to')  # half a line

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        changed = ["--lr", "0.5", "--layer-decay", "0.9", "--workers", "1", "--eval-scales", "0,1"]
        train(*flags, "--output-dir", str(folder), "--resume", "latest", *changed, "--report-to", "none")
    error = capsys.readouterr().err.splitlines()[-1].partition("; these may change: ")[0]
    assert re.search(r"with other settings: --lr was 0\.000\d+, is now 0\.5", error) and "workers" not in error
    assert "--layer-decay was 1.0, is now 0.9" in error and "report" not in error and "scales" not in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    train(*flags, "--output-dir", str(folder), "--resume", "latest")
    assert f"resumed from {folder}/checkpoints/step-000003" in capsys.readouterr().out
    assert numbers(folder) == numbers(straight)
    for name in ("adapter.safetensors", "adapter_best.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()

    assert yaml.safe_load((folder / "config.yaml").read_text())["checkpoints"]["resume"] is None

    # A finished run can also be resumed from any of its checkpoints.
    train(*flags, "--output-dir", str(folder), "--resume", str(folder / "checkpoints" / "step-000006"))
    assert numbers(folder) == numbers(straight)


def check_the_card(folder: Path) -> None:
    """The code of the card gives the results of the run back."""
    scope = card_scope(folder)
    held_out = [Path(name) for name in json.loads((folder / "split.json").read_text())["held_out"]["val"]]
    labels = torch.tensor([scope["answers"].index(path.parent.name) for path in held_out])
    model = scope["model"]
    with torch.no_grad():
        pictures = torch.stack([scope["preprocess"](Image.open(path)) for path in held_out])
        logits = model.logit_scale.exp() * model.encode_image(pictures, normalize=True) @ scope["classes"]
    after = summary_of(folder)["after"]["validation"]
    assert (logits.argmax(dim=1) == labels).float().mean().item() == pytest.approx(after["top1"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(after["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        ["--method", "randlora", "--train-logit-scale"],
        ["--method", "lora"],
        ["--method", "full", "--towers", "text"],
        ["--method", "linear-probe"],
        ["--method", "lora", "--towers", "vision", "--probe-lr", "0.05"],
    ],
    ids=lambda argv: "-".join(argv[1::4]),
)
def test_a_run_starts_from_an_adapter(
    method: list[str], train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of almost zero, the file stays as it was."""
    first = tmp_path / "first" / "adapter.safetensors"
    train(*method, "--output-dir", str(first.parent), "--lr", "0.01")
    start = [word.replace("0.05", "1e-30") for word in method] + ["--init-adapter", str(first)]
    train(*start, "--lr", "1e-30", "--weight-decay", "0", "--steps", "1")
    assert all(summary_of(folder)["reload_difference"] == 0 for folder in (first.parent, tmp_path / "run"))
    check_the_card(first.parent)
    one, other = load_file(first), load_file(tmp_path / "run" / "adapter.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-20)
    assert numbers(tmp_path / "run")[0]["loss"] == pytest.approx(numbers(first.parent)[-3]["loss"])
    capsys.readouterr()
    if method[1] in ("randlora", "lora"):
        with pytest.raises(SystemExit):
            train(*start, "--rank", "2", "--overwrite")
        assert "error: --init-adapter: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("--method", "full" if method[1] != "full" else "randlora", *start[2:], "--overwrite")
    assert "error: --init-adapter: " in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "limit"), [("class-prompts", 100.0), ("clip", 1.0)])
def test_the_logit_scale_stays_in_open_clips_bounds(
    loss: str, limit: float, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that throws it far beyond the bound, in both directions."""
    step = torch.optim.AdamW.step

    def far(self: Any, closure: Any = None) -> None:
        step(self, closure)
        for group in self.param_groups:
            if group.get("name") == "logit_scale":
                group["params"][0].data.fill_(99.0 if limit == 100 else -99.0)

    monkeypatch.setattr(torch.optim.AdamW, "step", far)
    folder = train("--loss", loss, "--train-logit-scale", "--logit-scale-lr", "0.1")
    saved = load_file(folder / "adapter.safetensors")["saved.logit_scale"]
    assert saved.exp().item() == pytest.approx(limit)


def test_every_rate_is_logged_by_name(train: Any) -> None:
    folder = train("--train-logit-scale", "--logit-scale-lr", "0.25", "--layer-decay", "0.5", "--lr", "0.01")
    line = next(line for line in numbers(folder) if line["split"] == "train")
    assert {name for name in line if name.startswith("lr")} == {"lr", "lr_logit_scale", "lr_layer_-2", "lr_layer_-3"}
    factor = line["lr"] / 0.01
    assert line["lr_logit_scale"] == pytest.approx(0.25 * factor)
    assert line["lr_layer_-3"] == pytest.approx(0.0025 * factor)


def test_a_runs_own_config_repeats_it(train: Any, tmp_path: Path) -> None:
    train("--method", "lora", "--optimizer", "nadamw", "--seed", "3", "--output-dir", str(tmp_path / "first"))
    first = tmp_path / "first"
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    script("train_clip").main(["--config", str(first / "config.yaml"), "--output-dir", str(tmp_path / "again")])
    assert numbers(tmp_path / "again") == numbers(first)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("first", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "argv",
    [
        ["--mixed-precision", "bf16", "--gradient-accumulation-steps", "2", "--max-grad-norm", "0",
         "--dropout", "0.1", "--init", "gamma-zero", "--bases", "sparse", "--alpha", "8"],
        ["--workers", "1", "--val-fraction", "0.3", "--split-seed", "4", "--target-modules", "c_fc", "c_proj",
         "--optimizer", "lookahead_lion", "--schedule", "linear", "--ema-decay", "0.9", "--best-metric", "loss",
         "--weight-decay", "0", "--warmup-fraction", "0.5"],
        ["--train-logit-scale", "--logit-scale-lr", "0.1", "--optimizer", "nadamw", "--schedule", "constant",
         "--target-modules", "all-linear", "--templates", "a {}", "the {}", "--prompts", "average"],
        ["--train-logit-scale", "--method", "full", "--channels-last", "--layer-decay", "0.7",
         "--gradient-checkpointing", "--report-to", "none"],
        ["--method", "lora", "--towers", "text", "--gradient-checkpointing", "--layer-decay", "0.5"],
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python, for loader processes
def test_options_reach_the_run(train: Any, argv: list[str]) -> None:
    assert (train(*argv) / "summary.json").exists()


def test_the_logit_scale_is_trained_at_its_own_rate_and_saved(train: Any, plain: Path, tiny: Path) -> None:
    folder = train("--train-logit-scale", "--logit-scale-lr", "0.2", "--schedule", "constant", "--optimizer", "lion")
    base, adapted = (tiny_clip(tiny).model for _ in range(2))
    load_adapter(adapted, folder / "adapter.safetensors")
    moved = (adapted.logit_scale - base.logit_scale).abs().item()
    assert moved == pytest.approx(0.2, rel=1e-4) or moved == pytest.approx(
        0.6, rel=1e-4
    )  # Lion moves by the learning rate itself
    trained = json.loads((folder / "summary.json").read_text())["trained_numbers"]
    assert trained == json.loads((plain / "summary.json").read_text())["trained_numbers"] + 1


def test_training_stops_early_and_keeps_the_best_and_the_last(
    train: Any, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "40", "--eval-every", "1", "--lr", "0.02", "--best-metric", "loss"]
    folder = train(*flags, "--early-stopping-patience", "2")
    loss = {line["step"]: line["loss"] for line in numbers(folder) if line["split"] == "val"}
    best = min(loss, key=lambda step: loss[step])
    assert max(loss) == best + 2 < 40
    assert json.loads((folder / "summary.json").read_text())["steps"] == best + 2
    assert f"after step {best}, kept in {folder}/adapter_best.safetensors" in capsys.readouterr().out
    assert numbers(folder)[-1] == {"step": best + 2, "split": "test", **numbers(folder)[-1]}
    last, kept = (load_file(folder / f"adapter{name}.safetensors") for name in ("", "_best"))
    assert not all(torch.equal(last[name], kept[name]) for name in last)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def captions(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with two captions per image."""
    table = tmp_path_factory.mktemp("captions") / "pairs.csv"
    lines = [
        f"{path},{text} {path.parent.name} number {path.stem}"
        for path in sorted(images.glob("*/*.png"))
        for text in ("a", "the")
    ]
    table.write_text("\n".join(["path,caption", *lines]) + "\n")
    return table


def test_a_run_on_captions(
    train: Any, captions: Path, images: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(captions), "--eval-scales", "0,0.5", "1", "--retention-data", str(images)]
    folder = train(*argv, "--lr", "0.01", "--loss", "siglip")
    assert {path.name for path in folder.iterdir()} == (RUN_FILES | {"scales.png"}) - {"confusion.png"}
    summary = summary_of(folder)
    ways = {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert set(summary["before"]["validation"]) == {*ways, "mean_recall", "images", "captions", "texts"}
    assert set(summary["confidence"]["after"]["validation"]) == ways
    assert set(summary["after"]["retention"]) == {"top1", "loss", "samples"} and "per_class" not in summary
    assert summary["after"]["retention"]["samples"] == len(list(images.glob("*/*.png")))  # nothing is trained on it
    assert summary["splits"] == {"validation": "validation", "retention": "all"}
    assert all(set(scale.pop("confidence")["validation"]) == ways for scale in summary["scales"])
    assert [scale.pop("scale") for scale in summary["scales"]] == [0, 0.5, 1]
    assert summary["scales"][0] == summary["before"] and summary["scales"][2] == summary["after"]
    assert summary["scales"][1] not in (summary["before"], summary["after"])
    assert summary["reload_difference"] == 0
    val = [line for line in numbers(folder) if line["split"] == "val"]
    assert all({*ways, "mean_recall", "loss"} <= set(line) for line in val)
    scope: dict[str, Any] = {}
    exec(printed_code(capsys.readouterr().out), scope)
    model = tiny_clip(tiny).model
    load_adapter(model, folder / "adapter.safetensors")
    features: Any = model
    with torch.no_grad():
        expected = features.encode_image(scope["picture"], normalize=True), features.encode_text(scope["texts"])
        logits = model.logit_scale.exp() * expected[0] @ torch.nn.functional.normalize(expected[1], dim=-1).T
    torch.testing.assert_close(scope["logits"], logits)
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["best_metric"] == "mean_recall"


def test_classes_are_trained_on_their_captions_too(train: Any) -> None:
    folder = train("--loss", "clip", "--gradient-accumulation-steps", "2")
    assert set(summary_of(folder)["after"]["validation"]) == {"top1", "loss", "samples"}


def test_an_adapter_is_measured_without_training(
    train: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train("--lr", "0.02")
    done = summary_of(trained)
    assert done["before"] != done["after"]
    assert list(done["per_class"]["after"]) == ["one", "two", "zero"]
    measured = tmp_path / "measured"
    argv = ["--eval-only", "--output-dir", str(measured)]
    of_split = [*argv, "--eval-split", "val"]
    train(*of_split, "--adapter", str(trained / "adapter.safetensors"), "--eval-scales", "0,1")
    summary = summary_of(measured)
    for key in ("before", "after", "tasks", "per_class", "per_class_samples", "confidence"):
        assert summary[key] == done[key]
    ends = [done[when]["validation"] for when in ("before", "after")]
    assert [scale["validation"] for scale in summary["scales"]] == ends
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    pictures = {"confusion.png", "predictions.png", "scales.png"}
    assert {path.name for path in measured.iterdir()} == expected | pictures

    kept = trained / "preprocessing.json"
    kept.write_text(kept.read_text().replace('"bilinear"', '"bicubic"'))
    with pytest.raises(SystemExit):
        train(*of_split, "--adapter", str(trained / "adapter.safetensors"), "--overwrite")
    expected_error = (
        f"images are not prepared as in {kept}: interpolation was bicubic, now bilinear; give the --force-image-size"
    )
    assert expected_error in capsys.readouterr().err

    train(*of_split, "--overwrite")
    summary = summary_of(measured)
    assert summary["before"] == done["before"] and summary["after"] is None
    assert not (measured / "scales.png").exists()
    train(*argv, "--overwrite")
    assert summary_of(measured)["before"]["all"]["samples"] == len(list(images.glob("*/*.png")))


@pytest.mark.parametrize("method", ["randlora", "full"])
def test_a_probe_learns_on_adapted_features(
    train: Any, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = train("--method", method, "--lr", "0.01") / "adapter.safetensors"
    done = summary_of(adapter.parent)
    probed = tmp_path / "probe"
    train("--method", "linear-probe", "--adapter", str(adapter), "--output-dir", str(probed), "--eval-scales", "0,1")
    summary = summary_of(probed)
    assert summary["before"]["validation"]["loss"] == pytest.approx(done["after"]["validation"]["loss"], rel=1e-5)
    assert summary["after"] != summary["before"] and summary["reload_difference"] == 0
    assert summary["scales"][0]["validation"] == summary["before"]["validation"]
    assert load_file(probed / "adapter.safetensors").keys() == {"class_features"}
    with pytest.raises(SystemExit):
        train("--method", "linear-probe", "--adapter", str(probed / "adapter.safetensors"), "--overwrite")
    assert "already holds a linear classifier: give an adapter without one" in capsys.readouterr().err


def test_the_towers_of_a_resnet_cannot_be_checkpointed(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-resnet.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        train("--model", str(tmp_path / "tiny-resnet.json"), "--gradient-checkpointing")
    assert "the vision tower of this CLIP has no blocks" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other backends compile the same graphs; tests/layers/test_compile.py compares their results for the adapters.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    vision = {**TINY_CONFIG["vision_cfg"], "layers": 1}  # compiling takes its time by the layer and by the adapter
    model = write_tiny_clip(tmp_path / "model", {**TINY_CONFIG, "vision_cfg": vision})
    flags = ["--model", f"local-dir:{model}", "--target-modules", "visual.transformer.resblocks.0.mlp.c_fc"]
    plain = train(*flags, "--output-dir", str(tmp_path / "plain")).parent / "plain"
    train(*flags, "--torch-compile", "--output-dir", str(tmp_path / "compiled"))
    for one, other in zip(numbers(plain), numbers(tmp_path / "compiled"), strict=True):
        assert one.pop("split") == other.pop("split")
        assert one == pytest.approx(other, rel=1e-3)


def test_unreadable_images_are_counted_and_listed(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_class_folders(tmp_path / "data")
    (data / "one" / "000.png").write_bytes(b"no image")
    folder = train("--data", str(data))
    assert "skipped 1 that cannot be used" in capsys.readouterr().out
    assert (folder / "skipped.txt").read_text().startswith(f"{data}/one/000.png\t")
    assert json.loads((folder / "summary.json").read_text())["skipped_images"] == 1


BAD: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "ViT-B-33"], "open_clip has no model 'ViT-B-33'; close matches: ViT-B-32"),
    "unknown tag": (["--model", "RN50", "--pretrained", "opnai"], "close matches: openai"),
    "unknown flag": (["--rnak", "3"], "Perhaps you meant --rank"),
    "no folder": (["--data", "{tmp}/nowhere"], "does not exist"),
    "no images": (["--data", "{tmp}/empty"], "no readable images"),
    "one class": (["--data", "{tmp}/one"], "only one class with images"),
    "corrupt image, strict": (["--data", "{tmp}/corrupt", "--strict-data"], "cannot read the image"),
    "no target": (["--target-modules", "no_such_layer"], "no_such_layer"),
    "rank above m": (["--rank", "4096"], "4096"),
    "LoRA rank above m": (["--rank", "4096", "--method", "lora"], "LoRA rank 4096 is above the smaller side"),
    "loss is not finite": (["--lr", "1e30", "--max-grad-norm", "0", "--steps", "20"], "training stopped after step"),
    "unknown optimiser": (["--optimizer", "adanw2"], "--optimizer adanw2 is not known; close matches: adanw"),
    "missing adapter": (["--eval-only", "--adapter", "{tmp}/a.safetensors"], "a.safetensors"),
    "adapter that is not used": (["--adapter", "{tmp}/a.safetensors"], "--adapter needs --eval-only, or"),
    "scales of nothing": (["--eval-only", "--eval-scales", "0,1"], "--eval-scales with --eval-only needs --adapter"),
    "scales that are not numbers": (["--eval-scales", "0,half"], "--eval-scales must be numbers separated by commas"),
    "scales that are not finite": (["--eval-scales", "0,inf"], "--eval-scales must be finite numbers"),
    "layer decay": (["--layer-decay", "0"], "--layer-decay must be above 0 and at most 1, got 0.0"),
    "resumed measuring": (["--eval-only", "--resume", "latest"], "--eval-only does not train: leave --resume out"),
    "unknown tracker": (["--report-to", "tensorbord"], "--report-to tensorbord is not known"),
    "retention data that is missing": (["--retention-data", "{tmp}/nowhere"], "nowhere"),
    "unknown metric": (["--best-metric", "top3"], "--best-metric top3 is not measured; choose one of top1, loss"),
    "unknown key in the file": (["--config", "{tmp}/typo.yaml"], "no option training: stepz; close matches: steps"),
    "missing checkpoint": (["--resume", "{tmp}/old/checkpoints/step-000010"], "there is no checkpoint"),
    "a run is there already": (["--output-dir", "{tmp}/old"], "already holds a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    if case == "one class":
        write_class_folders(tmp_path / "one", classes=(1,))
    if case == "corrupt image, strict":
        (write_class_folders(tmp_path / "corrupt") / "one" / "000.png").write_bytes(b"no image")
    (tmp_path / "typo.yaml").write_text("training: {stepz: 3}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    argv, expected = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        train(*[word.format(tmp=tmp_path) for word in argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    *_, last = error.strip().splitlines()
    assert last.startswith("error: ") and expected in last
    assert "Traceback" not in error and error.count("error: ") == 1


def test_a_diverged_run_keeps_the_last_good_adapter(train: Any, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train("--lr", "1e30", "--max-grad-norm", "0", "--steps", "20")
    model = tiny_clip(tiny).model
    load_adapter(model, tmp_path / "run" / "adapter.safetensors")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_the_embedded_default_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the default, with a smaller base that is pretrained for half of its steps, in half of its batches."""
    draw_nothing(monkeypatch)  # the run of the installed wheel draws
    smaller = copy.deepcopy(demo_clip._MODEL_CONFIG) | {"embed_dim": 64}
    smaller["vision_cfg"] |= {"width": 64, "layers": 2}
    smaller["text_cfg"] |= {"width": 64, "layers": 1, "heads": 2}
    monkeypatch.setattr(demo_clip, "_MODEL_CONFIG", smaller)
    monkeypatch.setattr(pretraining, "training_batches", read_once)
    monkeypatch.setattr(demo_clip, "_PRETRAINING", Pretraining(steps=75, batch_size=32, lr=2e-3))
    argv = ["--steps", "50", "--eval-every", "50", "--batch-size", "32", "--cache-dir", str(tmp_path / "cache")]
    run_script("train_clip", argv, {"--output-dir": str(tmp_path / "run")})
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    summary = summary_of(tmp_path / "run")
    assert summary["before"]["original"]["top1"] > 0.6  # the task the base was trained on, of five classes
    assert summary["before"]["test"]["top1"] < 0.2
    assert summary["after"]["test"]["top1"] > summary["before"]["test"]["top1"] + 0.1
    assert summary["reload_difference"] == 0
