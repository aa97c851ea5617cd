"""Tests of train_classifier.py, run as a user would run it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from randlora_vision.demos import classifier as demo_classifier
from randlora_vision.demos import pretraining
from randlora_vision.demos.pretraining import Pretraining
from randlora_vision.integrations.timm import load_adapter
from randlora_vision.train_scripts import train_classifier
from randlora_vision.training.data.sources import digits
from tests.train_scripts.test_train_clip import RUN_FILES
from tests.training_helpers import (
    card_scope,
    draw_nothing,
    printed_code,
    read_once,
    run_script,
    write_class_folders,
    write_tiny_vit,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("models") / "tiny", classes=5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def train(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return train_classifier.main with defaults for the tiny model and folder; `argv` overrides them."""
    draw_nothing(monkeypatch)

    def main(*argv: str) -> Path:
        defaults = {"--data": str(images), "--output-dir": str(tmp_path / "run")}
        if "--model" not in argv:
            argv = ("--model", f"local-dir:{tiny}", "--pretrained", *argv)
        run_script("train_classifier", argv, defaults if "--budget" in argv else {**defaults, "--rank": "4"})
        return tmp_path / "run"

    return main


def test_a_run_goes_to_the_hub_and_a_failure_is_one_line(
    train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    sent: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def whoami(self) -> dict[str, str]:
            return {"name": "me"}

        def create_repo(self, repository: str, **_: Any) -> None:
            if "fail" in repository:
                raise ConnectionError("no route\nto host")

        def upload_folder(self, **given: Any) -> Any:
            sent.append(given)
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit):
        train("--push-to-hub")
    assert "--push-to-hub needs a login: set the environment variable HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    folder = train("--push-to-hub", "--method", "linear-probe")
    assert "uploaded: https://hub/commit" in capsys.readouterr().out
    (given,) = sent
    assert given["repo_id"] == "me/run" and given["folder_path"] == str(folder)
    assert {"README.md", "adapter.safetensors", "summary.json", "curves.png"} <= set(given["allow_patterns"])
    assert "config.yaml" not in given["allow_patterns"]  # it has paths of this machine
    card = (folder / "README.md").read_text()
    assert "load_file(hf_hub_download('me/run', 'adapter.safetensors'))" in card and str(folder) not in card
    assert "![Training](curves.png)" in card and "| top1 |" in card
    train("--push-to-hub", "--hub-model-id", "me/fail", "--method", "linear-probe", "--overwrite")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "fail" in line]
    assert (
        line.startswith("note: the upload to me/fail failed (") and "no route" in line and "hf upload me/fail" in line
    )
    assert (folder / "summary.json").exists() and not (folder / ".lock").exists()


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_timm_command_trains(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    how = "-b 4 -j 0 --epochs 2 --warmup-epochs 1 --val-interval 1 --opt adamw --opt-betas 0.8 0.9 --min-lr 1e-5"
    what = "--pretrained --drop-path 0.1 --bce-loss --smoothing 0.1 --remode pixel --reprob 0.2 --experiment a"
    argv = [str(images), "--model", f"local-dir:{tiny}", *how.split(), *what.split(), f"--output={tmp_path}"]
    train_classifier.main(argv)
    training = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["training"]
    size = json.loads((tmp_path / "a" / "split.json").read_text())["sizes"]["train"]
    assert training["steps"] == math.ceil(2 * size / 4) == summary(tmp_path / "a")["steps"]
    assert (training["epochs"], training["warmup_steps"], training["eval_every"]) == (
        None,
        round(size / 4),
        round(size / 4),
    )
    assert (training["beta1"], training["min_lr"]) == (0.8, 1e-5)


def test_a_rate_that_is_too_high_is_said(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    warning = summary(train("--lr", "30"))["warning"]
    assert "--lr 30 is probably too high: try --lr 1e+01" in warning
    assert capsys.readouterr().out.count(f"WARNING: {warning}\n") == 1


def test_a_run_on_class_folders(train: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("--bases", "normal")
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    printed = capsys.readouterr().out
    assert "blocks.*.attn.qkv" in printed and "head.weight" in printed  # the injection report
    assert "equal outputs (largest difference of a logit: 0.0e+00)" in printed
    assert f"model = timm.create_model('local-dir:{tiny}', pretrained=True, num_classes=3)" in printed
    assert f"load_adapter(model, '{folder}/adapter.safetensors')" in printed
    scope: dict[str, Any] = {}
    exec(printed_code(printed), scope)
    model = timm.create_model(f"local-dir:{tiny}", pretrained=True, num_classes=3).eval()
    load_adapter(model, folder / "adapter.safetensors")
    picture = scope["transform"](Image.new("RGB", (224, 224)))[None]
    assert scope["answers"] == ["one", "two", "zero"]
    torch.testing.assert_close(scope["logits"], model(picture).detach())

    values = summary(folder)
    assert values["method"] == "randlora" and values["steps"] == 3
    assert values["file_bytes"] == (folder / "adapter.safetensors").stat().st_size
    assert values["head_numbers"] == 3 * 33 < values["trained_numbers"]
    assert values["before"] is None  # the head is new
    assert set(values["tasks"]) == {"validation"}  # there is no test split
    assert set(values["after"]["validation"]) == {"top1", "loss", "samples"}
    assert values["per_class_samples"] == dict.fromkeys(
        values["per_class"], values["after"]["validation"]["samples"] // 3
    )
    assert list(values["per_class"]) == ["one", "two", "zero"]
    assert np.mean(list(values["per_class"].values())) == pytest.approx(values["after"]["validation"]["top1"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["adapter"]["bases"] == "normal"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        split: [line["step"] for line in lines if line["split"] == split] for split in ("train", "val", "validation")
    }
    assert steps == {"train": [1, 2, 3], "val": [0, 2, 3], "validation": [3]}


@pytest.mark.parametrize("method", ["randlora", "lora", "vera", "full", "linear-probe"])
def test_the_code_of_the_card_gives_the_accuracy_back(train: Any, method: str) -> None:
    folder = train("--method", method, "--lr", "0.01")
    assert summary(folder)["reload_difference"] == 0
    if method in ("lora", "vera"):  # the random projections are not saved
        assert summary(folder)["file_bytes"] <= 4 * summary(folder)["trained_numbers"] + 8192
    scope = card_scope(folder)
    held_out = [Path(name) for name in json.loads((folder / "split.json").read_text())["held_out"]["val"]]
    labels = torch.tensor([scope["answers"].index(path.parent.name) for path in held_out])
    with torch.no_grad():
        logits = scope["model"](torch.stack([scope["transform"](Image.open(path).convert("RGB")) for path in held_out]))
    after = summary(folder)["after"]["validation"]
    assert (logits.argmax(dim=1) == labels).float().mean().item() == pytest.approx(after["top1"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(after["loss"], rel=1e-4)


@pytest.mark.parametrize("model", ["test_convnext", "test_efficientnet", "deit_tiny_distilled_patch16_224"])
def test_other_families_from_random_weights(train: Any, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("--model", model, "--img-size", "32")
    assert summary(folder)["reload_difference"] == 0
    assert "RANDOM weights" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["randlora", "full"])
def test_the_statistics_of_batch_normalisation_stay_the_bases(train: Any, tmp_path: Path, method: str) -> None:
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    start = ["--model", "test_resnet", "--initial-checkpoint", str(tmp_path / "resnet.pth")]
    assert summary(train(*start, "--img-size", "32", "--method", method))["reload_difference"] == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["--auto-augment", "rand-m9-mstd0.5-inc1", "--random-erasing", "0.25", "--label-smoothing", "0.1",
         "--shots", "2", "--method", "lora", "--budget", "1000"],
        ["--target-modules", "timm:attention", "--gradient-accumulation-steps", "2", "--mixed-precision", "bf16",
         "--mixup", "0.8", "--cutmix", "1.0", "--label-smoothing", "0.1"],
        ["--layer-decay", "0.7", "--gradient-checkpointing", "--channels-last", "--report-to", "none"],
        ["--method", "lora", "--layer-decay", "0.7", "--head-lr", "0.01", "--gradient-checkpointing"],
    ],
)  # fmt: skip
def test_options_reach_the_run(train: Any, argv: list[str]) -> None:
    assert summary(train(*argv))["reload_difference"] == 0


def test_few_shots_are_drawn_without_replacement_and_listed(train: Any) -> None:
    folder = train("--shots", "3")
    split = json.loads((folder / "split.json").read_text())
    assert split["sizes"]["train"] == 9 and len(set(split["chosen"])) == 9
    assert json.loads((train("--shots", "3", "--overwrite") / "split.json").read_text()) == split


def test_a_checkpoint_with_the_right_head_is_measured_before(train: Any, tiny: Path, tmp_path: Path) -> None:
    model = timm.create_model(f"local-dir:{tiny}", pretrained=True, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "three.pth")
    start = ["--model", f"local-dir:{tiny}", "--initial-checkpoint", str(tmp_path / "three.pth")]
    assert summary(train(*start))["before"]["validation"].keys() == {"top1", "loss", "samples"}
    assert summary(train(*start, "--fresh-head", "--overwrite"))["before"] is None


def test_a_checkpoint_with_another_head_gets_a_fresh_one(
    train: Any, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--model", f"local-dir:{tiny}", "--initial-checkpoint", str(tiny / "model.safetensors"), "--fresh-head")
    assert "model.reset_classifier(3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--mixup", "0.5", "--cutmix", "1"],
        ["--method", "vera"],
        ["--method", "full"],
        "--aug-splits 2 --jsd-loss --aug-repeats 2 --auto-augment augmix-m3-w3 --optimizer-kwargs amsgrad=True".split(),
    ],
)
def test_a_resumed_run_learns_the_same(train: Any, argv: list[str]) -> None:
    argv = [*argv, "--steps", "4", "--checkpoint-every", "2", "--head-lr", "0.01"]
    folder = train(*argv)
    whole = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").unlink()
    checkpoint = next(path for path in (folder / "checkpoints").iterdir() if path.name.endswith("2"))
    train(*argv, "--resume", str(checkpoint))
    assert (folder / "adapter.safetensors").read_bytes() == whole


@pytest.mark.parametrize("method", ["randlora", "full"])
def test_the_head_has_a_learning_rate_of_its_own_and_the_file_loads(train: Any, method: str) -> None:
    """The rate is so small that the head keeps its initial state."""
    folder = train("--method", method, "--head-lr", "1e-30", "--lr", "0.01", "--weight-decay", "0")
    saved = load_file(folder / "adapter.safetensors")
    (weight,) = (tensor for name, tensor in saved.items() if name.endswith("head.weight"))
    assert weight.abs().max() < 0.01
    assert any(tensor.abs().max() > 0.01 for name, tensor in saved.items() if "head" not in name)
    assert summary(folder)["reload_difference"] == 0


def test_torchvisions_own_format(train: Any, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    splits = digits.read_digits()
    for split, name in (("train", "train"), ("test", "t10k")):
        chosen = splits.images[split][:40]
        pixels = np.stack([np.asarray(image.convert("L").resize((28, 28))) for image in chosen])
        header = np.array([0x803, len(pixels), 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, len(pixels)], ">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + np.uint8(splits.labels[split][:40]).tobytes())
    folder = train("--data", "timm:torch/mnist", "--data-root", str(tmp_path))
    split = json.loads((folder / "split.json").read_text())
    assert len(split["class_names"]) == 10 and split["class_names"][3] == "3"
    assert split["sizes"]["test"] == 40 and split["sizes"]["train"] + split["sizes"]["val"] == 40
    assert len(summary(folder)["per_class"]) == 10


def test_a_table_of_classes(train: Any, images: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name}" for path in sorted(images.rglob("*.png"))]
    (tmp_path / "images.csv").write_text("\n".join(["path,label", *rows]))
    assert summary(train("--data", str(tmp_path / "images.csv")))["reload_difference"] == 0


BAD: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "vit_smal_patch16_224"], "close matches: vit_small_patch16_224"),
    "unknown tag": (["--model", "resnet18.a1_in2k", "--pretrained"], "close matches: resnet18.a1_in1k"),
    "unknown flag": (["--rnak", "3"], "Perhaps you meant --rank"),
    "no folder": (["--data", "{tmp}/nowhere"], "does not exist"),
    "no images": (["--data", "{tmp}/empty"], "no readable images"),
    "one class": (["--data", "{tmp}/one"], "only one class with images"),
    "corrupt image, strict": (["--data", "{tmp}/corrupt", "--strict-data"], "cannot read the image"),
    "other number of classes": (["--num-classes", "4"], "the data has 3 classes, but --num-classes says 4"),
    "other head": (
        ["--model", "local-dir:{tiny}", "--initial-checkpoint", "{tiny}/model.safetensors"],
        "has a classifier of 5 classes, but the data has 3",
    ),
    "no checkpoint": (["--model", "resnet10t", "--initial-checkpoint", "{tmp}/no.pth"], "no file"),
    "no checkpoint in it": (["--model", "resnet10t", "--initial-checkpoint", "{tmp}/text.pth"], "cannot read"),
    "two sources of weights": (["--initial-checkpoint", "x"], "both choose the weights"),
    "no target": (["--target-modules", "no_such_layer"], "no_such_layer"),
    "rank above m": (["--rank", "4096"], "4096"),
    "LoRA rank above m": (["--rank", "4096", "--method", "lora"], "LoRA rank 4096 is above the smaller side"),
    "augmentation": (["--auto-augment", "nonsense"], "timm cannot create the --auto-augment 'nonsense'"),
    "odd mixup": (["--mixup", "0.2", "--batch-size", "7"], "need an even --batch-size"),
    "loss is not finite": (["--lr", "1e30", "--max-grad-norm", "0", "--steps", "20"], "training stopped after step"),
    "unknown dataset": (["--data", "timm:torch/nope", "--data-root", "{tmp}"], "Unknown torchvision dataset nope"),
    "dataset not there": (["--data", "timm:torch/mnist", "--data-root", "{tmp}"], "--download"),
    "captions": (["--data", "digits-pairs"], "has captions, not classes"),
    "a run is there already": (["--output-dir", "{tmp}/old"], "already holds a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, train: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no weights")
    write_class_folders(tmp_path / "one", classes=(1,))
    corrupt = write_class_folders(tmp_path / "corrupt")
    (corrupt / "one" / "000.png").write_bytes(b"no image")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    argv, expected = BAD[case]
    with pytest.raises(SystemExit) as stopped:
        train(*[word.format(tmp=tmp_path, tiny=tiny) for word in argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    *_, last = error.strip().splitlines()
    assert last.startswith("error: ") and expected in last
    assert "Traceback" not in error and error.count("error: ") == 1


@pytest.mark.slow
def test_the_embedded_default_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the default, with a smaller base that is pretrained on pictures that are read once."""
    draw_nothing(monkeypatch)  # train_clip.py, run from the installed wheel, draws with the same functions
    monkeypatch.setattr(pretraining, "training_batches", read_once)
    smaller = {**demo_classifier._MODEL_ARGS, "embed_dim": 64, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(demo_classifier, "_MODEL_ARGS", smaller)
    monkeypatch.setattr(demo_classifier, "_PRETRAINING", Pretraining(steps=120, batch_size=32, lr=3e-3))
    argv = ["--steps", "50", "--eval-every", "50", "--batch-size", "32", "--cache-dir", str(tmp_path / "cache")]
    run_script("train_classifier", argv, {"--output-dir": str(tmp_path / "run")})
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    values = summary(tmp_path / "run")
    assert values["before"]["original"]["top1"] > 0.4  # the task the base was trained on, of five classes
    assert values["before"]["test"]["top1"] < 0.2
    assert values["after"]["test"]["top1"] > values["before"]["test"]["top1"] + 0.1
    assert values["reload_difference"] == 0
