from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from randlora_vision.training.evaluation.model_card import Base, at_hub, commit_of, write_card
from randlora_vision.training.evaluation.publishing import repository_name
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.run_folder import RunFolder

SUMMARY: dict[str, Any] = {
    "method": "randlora",
    "trained_numbers": 1234,
    "file_bytes": 5678,
    "steps": 9,
    "tasks": {"test": "flowers", "retention": "imagenet"},
    "splits": {"test": "test", "retention": "all"},
    "before": {"test": {"top1": 0.25, "samples": 40}, "retention": {"top1": 0.5, "samples": 10}},
    "after": {"test": {"top1": 0.75, "samples": 40}, "retention": {"top1": 0.4, "samples": 10}},
    "confidence": {"after": {"test": {"top1": [0.6, 0.86]}}},
}


def test_the_card_has_the_base_the_results_the_code_and_the_pictures(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    Image.new("RGB", (1, 1)).save(run.curves)
    base = Base("timm", "image-classification", "vit.tag", "timm/vit.tag", "abc123")
    code = [f"load_adapter(model, {str(run.adapter)!r})"]
    training = Training(steps=9, lr=0.001)
    write_card(run, base, "flowers", training, SUMMARY, code, "me/x")
    _, front, text = run.card.read_text().split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "timm/vit.tag" and values["library_name"] == "timm"
    (first, second) = values["model-index"][0]["results"]
    assert first["metrics"] == [{"type": "accuracy", "name": "top-1 accuracy", "value": 0.75}]
    assert second["dataset"]["name"] == "imagenet, retention (all images)"
    assert "revision `abc123`" in text and "![Training](curves.png)" in text and "samples.png" not in text
    assert "| flowers, test | top1 | 25.0% | 75.0% | 60.0% to 86.0% |" in text
    assert "load_adapter(model, hf_hub_download('me/x', 'adapter.safetensors'))" in text
    after = {"loss": 0.25, "subject": 0.75, "subject_pictures": 16}
    losses = {"before": {"loss": 0.5}, "after": after, "confidence": {"after": {"subject": [0.505, 0.898]}}}
    write_card(run, Base("diffusers", "text-to-image", "sd"), "dogs", training, {**SUMMARY, **losses}, code)
    assert "| training images | loss | 0.5 | 0.25 |  |" in run.card.read_text()
    assert "| generated pictures | subject |  | 75.0% | 50.5% to 89.8% |" in run.card.read_text()
    assert str(run.adapter) in run.card.read_text() and "base_model:" not in run.card.read_text()


def test_code_reads_from_the_repository_instead_of_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    code = [f"pipe.load_lora_weights({str(tmp_path)!r}, weight_name='adapter.safetensors')"]
    assert at_hub(code, run, "me/x")[1:] == ["pipe.load_lora_weights('me/x', weight_name='adapter.safetensors')"]


def test_the_commit_is_that_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_text("c0ffee\n")
    assert commit_of("a/b") == "c0ffee" and commit_of("a/b", "v1") == "v1" and commit_of("a/c") is None


@pytest.mark.parametrize(
    ("folder", "name"), [("a b--c", "a-b-c"), ("..x", "x"), ("ä", "adapter"), ("clip-20260101-120000", None)]
)
def test_the_repository_is_named_after_the_folder(folder: str, name: str | None, tmp_path: Path) -> None:
    assert repository_name(tmp_path / folder) == (name or folder)
