"""explain.py on the runs of both scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_vision.train_scripts import train_clip
from randlora_vision.training.clip.load import load_classifier
from randlora_vision.training.clip.methods import adapt
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, ModelOptions
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.harness.options import TrainingOptions
from randlora_vision.training.harness.run_folder import RunFolder
from tests.training_helpers import (
    QUICK,
    clip_settings,
    draw_nothing,
    script,
    tiny_clip,
    write_class_folders,
    write_tiny_clip,
    write_tiny_vit,
)


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
    adapted = [name for name in ranks["lora"] if name != "head.weight"]  # every method trains that in full
    assert all(ranks["lora"][name] < ranks["randlora"][name] for name in adapted)
    loss = record["loss on the plane"]["loss"]
    assert len(loss) == 3 and len(loss[0]) == 3
    assert all(0 <= value <= 1.0001 for held in record["CKA"]["base"].values() for value in held.values())


def test_the_loss_of_a_model_whose_text_tower_is_adapted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class features are those of the text tower of the model, not of the base."""
    draw_nothing(monkeypatch)
    images, tiny = write_class_folders(tmp_path / "images"), write_tiny_clip(tmp_path / "tiny")
    options = ClipOptions(
        clip=ModelOptions(model=f"local-dir:{tiny}"),
        images=ImageOptions(data=str(images), prompts="average"),
        adapter=ClipAdapterOptions(rank=4),
        training=TrainingOptions(lr=1e-3),
    )
    clip, skipped = tiny_clip(tiny), SkipList()
    settings = clip_settings(options, clip.model)
    data: Any = train_clip.read_task(settings, skipped)
    _, adaptation = adapt(clip, data.class_names, settings)
    with torch.no_grad():
        for _, parameter in adaptation.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    run = RunFolder(tmp_path)
    adaptation.save(run.adapter)
    run.write_config(settings)

    explain = script("explain")
    subject = explain.clip_subject(run.config, 6)
    pictures, labels = explain._sample(data.select("train", clip.eval_transform, skipped), 6)
    classifier = load_classifier(tiny_clip(tiny), data.class_names, settings, run.adapter)
    assert classifier is not None
    expected = torch.nn.functional.cross_entropy(classifier.predict(pictures), labels)
    assert subject.loss(subject.adapted(run.adapter)) == pytest.approx(float(expected), rel=1e-5)
    assert subject.loss(subject.model) != pytest.approx(float(expected), rel=1e-2)


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("explain").main([str(tmp_path)])
    assert "holds no finished run" in capsys.readouterr().err
