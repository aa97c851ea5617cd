from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from randlora_vision.files.atomic import fingerprint, replacing, write_json
from randlora_vision.training.clip.evaluation import Evaluation
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.evaluation import results
from randlora_vision.training.evaluation.results import check_equal, plot_results
from randlora_vision.training.harness.options import RunOptions
from randlora_vision.training.harness.run_folder import RunFolder, open_run_folder
from randlora_vision.training.methods.adaptation import TrainedTensors, finite_gradients
from tests.training_helpers import NO_SKIPS, clip_settings, tiny_clip


def opened(path: Path, overwrite: bool = False, writing: bool = True) -> RunFolder:
    return open_run_folder(RunOptions(output_dir=str(path), overwrite=overwrite), "test", writing)


def test_a_new_folder_knows_its_environment(tmp_path: Path) -> None:
    run = opened(tmp_path / "new" / "run")
    versions = json.loads(run.environment.read_text())["packages"]
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert "randlora_vision" in versions


def test_a_run_is_refused_or_replaced_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path)  # a folder with other files in it is not a run
    run = opened(tmp_path)  # nor is one without metrics
    run.log(3, "val", {"top1": 0.5})
    with pytest.raises(ValueError, match=r"already holds a run \(.*--overwrite"):
        opened(tmp_path)
    again = opened(tmp_path, overwrite=True)
    assert not again.metrics.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_default_folder_is_named_by_script_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run_folder(RunOptions(), "clip")
    assert run.path.parent == Path("runs") and run.path.name.startswith("clip-20")
    assert open_run_folder(RunOptions(runs_dir="a", run_name="b"), "clip").path == Path("a/b")


def test_metrics_are_one_object_a_line_on_disk_at_once(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.log(0, "val", {"top1": 0.25})
    run.log(1, "train", {"loss": 2.0})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"step": 0, "split": "val", "top1": 0.25}, {"step": 1, "split": "train", "loss": 2.0}]
    assert run.read_metrics() == lines


def test_the_configuration_is_written_resolved(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.write_config(clip_settings(ClipOptions()))
    written = yaml.safe_load(run.config.read_text())
    assert written["adapter"]["rank"] == 16
    assert written["training"]["lr"] == 2e-3
    assert len(written["images"]["templates"]) == 5


def test_only_one_process_writes(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", writing=False)
    run.log(0, "val", {"top1": 1.0})
    run.write_config(ClipOptions())
    run.write(run.summary, {})
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints_follow_the_content() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_an_exam_measures_the_new_task_and_the_original_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny_clip(tmp_path / "tiny")
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    splits = ImageSplits(
        name="colours",
        class_names=["red", "blue"],
        images={"test": [red, blue] * 3},
        labels={"test": [0, 1] * 3},
        origin="",
    )
    evaluation = Evaluation(clip, {"test": splits, "original": splits}, clip_settings(ClipOptions()), NO_SKIPS)
    before = evaluation.run(clip)
    assert set(before.results) == {"test", "original"}
    assert str(before).count("colours, test images: top-1") == 2
    assert str(before).count(" 6 images)") == 2
    predictions = evaluation.predictions(before, before)
    assert len(predictions) == 6
    titles: list[str] = []
    monkeypatch.setattr(results, "plot_predictions", lambda items, title, path: titles.append(title))
    monkeypatch.setattr(results, "plot_confusion", lambda *_: None)
    for shown in (predictions, predictions[:4]):
        plot_results(RunFolder(tmp_path), shown, before.scores["test"], ["red", "blue"], "test", "now")
    assert titles == ["Test images now", "4 of the 6 test images now"]  # a sample says that it is one
    right = [item.before == item.truth for item in predictions]
    assert before.results["test"]["top1"] == pytest.approx(sum(right) / 6)
    assert {(item.picture.getpixel((0, 0)), item.truth) for item in predictions} == {
        ((255, 0, 0), "red"),
        ((0, 0, 255), "blue"),
    }


def test_a_reloaded_model_must_give_the_trained_models_logits(tmp_path: Path) -> None:
    run, trained = opened(tmp_path), torch.tensor([[1.0, -2.0]])
    assert check_equal(trained + 1e-5, trained, run) == pytest.approx(1e-5, rel=0.02)
    for reloaded in (trained + 1e-3, trained * torch.nan):
        with pytest.raises(RuntimeError, match="adapter.safetensors does not reproduce the trained model"):
            check_equal(reloaded, trained, run)


def test_parameters_without_a_gradient_are_noted_or_all_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    adaptation = TrainedTensors(model, ["weight", "bias"], "both", [])
    with pytest.raises(ValueError, match="no trained parameter has a gradient"):
        adaptation.check_gradients()
    model.weight.grad = torch.zeros(2, 2)
    assert adaptation.check_gradients() == ["no gradient reaches bias: they stay unchanged"]
    broken = SimpleNamespace(grad=torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="the gradient of x is not finite"):
        finite_gradients([("x", broken)])  # type: ignore[list-item]
