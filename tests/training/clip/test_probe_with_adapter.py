"""The linear classifier that is trained together with an adapter (`--probe-lr`)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from randlora_vision.training.clip.classifier import ClassPromptLoss, ClipClassifier
from randlora_vision.training.clip.load import load_classifier
from randlora_vision.training.clip.methods import adapt, own_rates
from randlora_vision.training.clip.options import (
    ClipAdapterOptions,
    ClipOptions,
    ClipSettings,
    LossOptions,
    ModelOptions,
)
from randlora_vision.training.clip.results import loading_code
from randlora_vision.training.data.options import ImageOptions
from tests.training_helpers import clip_settings, tiny_clip, write_tiny_clip

NAMES = ["zero", "one", "two"]
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
VISION = ModelOptions(model="tiny", towers="vision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


def settings_of(method: Any, probe_lr: float | None = 0.05) -> ClipSettings:
    adapter = ClipAdapterOptions(method=method, rank=None if method == "full" else 4, probe_lr=probe_lr)
    return clip_settings(ClipOptions(clip=VISION, images=ImageOptions(prompts="average"), adapter=adapter))


def gradients(folder: Path, settings: ClipSettings) -> tuple[ClipClassifier, dict[str, torch.Tensor]]:
    """Return the classifier and the gradients of the first batch."""
    torch.manual_seed(0)
    classifier, adaptation = adapt(tiny_clip(folder), NAMES, settings)
    assert classifier is not None
    classifier.train()
    ClassPromptLoss(classifier)({"images": IMAGES, "labels": LABELS}).backward()
    assert adaptation.check_gradients() == []
    return classifier, {name: p.grad.clone() for name, p in adaptation.parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["randlora", "lora", "dora", "nola", "full"])
def test_first_gradients(method: str, folder: Path) -> None:
    """The classifier's is that of softmax regression on the image features; the adapter's is that without it."""
    settings = settings_of(method)
    classifier, found = gradients(folder, settings)
    with torch.no_grad():
        model: Any = tiny_clip(folder).model.double()
        features = F.normalize(model.encode_image(IMAGES.double()), dim=-1)
        prompts = ClipClassifier(tiny_clip(folder), NAMES, settings.images.templates).prompt_features().double()
        scale = model.logit_scale.double().exp()
        errors = (scale * features @ prompts.T).softmax(-1) - F.one_hot(LABELS, 3)
        expected = scale * errors.T @ features / len(LABELS)
    torch.testing.assert_close(found.pop("class_features").double(), expected, rtol=1e-4, atol=1e-6)
    _, alone = gradients(folder, settings_of(method, None))
    assert found.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert classifier.class_features is not None


@pytest.mark.parametrize("method", ["randlora", "lora", "vera", "full"])
def test_a_trained_file_loads_at_every_scale_and_by_the_printed_code(method: str, folder: Path, tmp_path: Path) -> None:
    settings, clip = settings_of(method), tiny_clip(folder)
    plain = ClipClassifier(tiny_clip(folder), NAMES, settings.images.templates).predict(IMAGES)
    classifier, adaptation = adapt(clip, NAMES, settings)
    assert classifier is not None
    torch.testing.assert_close(classifier.predict(IMAGES), plain, rtol=1e-4, atol=1e-4)
    probe = classifier.class_features
    assert probe is not None
    rates = own_rates(clip.model, settings)
    assert {id(p): float(rate) for p, rate in rates.items()} == {id(probe): 0.05}
    start = probe.detach().clone()
    with torch.no_grad():
        for _, parameter in adaptation.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "adapter.safetensors"
    adaptation.save(path)
    trained = classifier.predict(IMAGES)
    for scale in (0.0, 0.5, 1.0):
        fresh = load_classifier(tiny_clip(folder), NAMES, settings, path, scale)
        assert fresh is not None and fresh.class_features is not None
        assert not any(p.requires_grad for p in fresh.parameters())
        torch.testing.assert_close(fresh.class_features, torch.lerp(start, probe.detach(), scale))
        if scale != 0.5:
            torch.testing.assert_close(fresh.predict(IMAGES), plain if scale == 0 else trained, rtol=1e-4, atol=1e-4)
    run: Any = SimpleNamespace(adapter=path, summary=tmp_path / "summary.json")
    lines = loading_code(run, settings, adaptation, NAMES)
    start_line = next(i for i, line in enumerate(lines) if "load_trained" in line)
    scope: dict[str, Any] = {"model": tiny_clip(folder).model}
    exec("\n".join(lines[start_line : start_line + 2]), scope)
    assert torch.equal(scope["class_features"], probe.detach())


@pytest.mark.parametrize(
    ("change", "captions", "expected"),
    [
        ({"clip": ModelOptions(model="tiny")}, False, "takes the place of the text tower, give --towers vision"),
        ({"adapter": {"method": "linear-probe"}}, False, "--method linear-probe trains the classifier alone, at --lr"),
        ({"adapter": {"probe_lr": 0.0}}, False, "--probe-lr must be above 0, got 0.0"),
        (
            {"loss": LossOptions("siglip")},
            False,
            "--probe-lr trains a classifier: it cannot be trained with --loss sig",
        ),
        ({"loss": LossOptions("clip")}, True, "--probe-lr trains a classifier: it cannot be trained with --loss clip"),
        ({}, True, "--probe-lr trains a classifier and needs data with classes, but this has captions"),
    ],
)
def test_what_it_does_not_go_with(change: dict[str, Any], captions: bool, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        adapter = ClipAdapterOptions(**{"probe_lr": 0.05, **change.pop("adapter", {})})
        clip_settings(ClipOptions(**{"clip": VISION, "adapter": adapter, **change}), captions=captions)
