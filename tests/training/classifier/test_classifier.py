from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import AugMixDataset
from timm.loss import JsdCrossEntropy
from torch import nn
from torch.nn import functional as F

from randlora_vision.demos import classifier as demo_classifier
from randlora_vision.demos.pretraining import Pretraining
from randlora_vision.integrations.timm import head_modules
from randlora_vision.training.classifier.defaults import resolve
from randlora_vision.training.classifier.evaluation import evaluate
from randlora_vision.training.classifier.loss import ClassifierLoss
from randlora_vision.training.classifier.methods import adapt
from randlora_vision.training.classifier.models import load_classifier
from randlora_vision.training.classifier.options import (
    AugmentOptions,
    ClassifierAdapterOptions,
    ClassifierModel,
    ClassifierOptions,
    ClassifierSettings,
    DataOptions,
)
from randlora_vision.training.data.labelled import LabelledImages
from randlora_vision.training.data.read import read_data
from randlora_vision.training.data.splits import few_shot_indices
from randlora_vision.training.evaluation.curves import plot_confusion
from randlora_vision.training.harness.seeding import seed_everything
from randlora_vision.training.methods.peft import load_peft
from tests.data_helpers import png
from tests.training_helpers import NO_SKIPS, write_class_folders, write_tiny_vit

LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])
IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("models") / "tiny", classes=5)


def model_of(tiny: Path) -> ClassifierModel:
    return ClassifierModel(model=f"local-dir:{tiny}", pretrained=True)


def settings_of(chosen: ClassifierModel, model: nn.Module, method: Any, **adapter: Any) -> ClassifierSettings:
    options = ClassifierOptions(adapter=ClassifierAdapterOptions(method=method, **adapter))
    return resolve(options, chosen, model, lambda: torch.empty(0))  # the embedded digits have a table of rates


def batches(size: int = 4) -> list[Any]:
    return [{"images": x, "labels": y} for x, y in zip(IMAGES.split(size), LABELS.split(size), strict=True)]


# Measuring


def logits_model(logits: torch.Tensor) -> torch.nn.Module:
    """Return a model that maps the k-th image to the k-th row."""

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.at = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.at += len(images)
            return logits[self.at - len(images) : self.at] + self.weight

    return Fixed()


def test_scores_are_those_of_the_definition() -> None:
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    scores = evaluate(logits_model(logits), batches(), 7)
    ranks = (logits > logits.gather(1, LABELS[:, None])).sum(dim=1)
    assert scores.values["top1"] == pytest.approx((ranks < 1).float().mean().item())
    assert scores.values["top5"] == pytest.approx((ranks < 5).float().mean().item())
    assert scores.values["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    assert scores.confusion.sum() == 9
    for label, answer in zip(LABELS.tolist(), logits.argmax(dim=1).tolist(), strict=True):
        assert scores.confusion[label, answer] > 0
    assert scores.per_class[0] == pytest.approx((logits.argmax(dim=1) == 0)[[0, 7]].float().mean().item())


def test_a_head_of_fewer_classes_has_no_loss() -> None:
    scores = evaluate(logits_model(F.one_hot(LABELS % 3, 3).float()), batches(), 7)
    assert set(scores.values) == {"top1", "samples"}
    assert scores.values["top1"] == pytest.approx(5 / 9)
    assert scores.per_class == [1, 1, 1, 0, 0, 0, 0]


def test_a_class_without_images_has_no_accuracy() -> None:
    assert evaluate(logits_model(torch.zeros(9, 8)), batches(), 8).per_class[7] is None


@pytest.mark.parametrize("classes", [2, 30, 120])
def test_confusion_of_few_and_of_many_classes(classes: int, tmp_path: Path) -> None:
    counts = np.eye(classes, dtype=int) * 9 + 1
    counts[0] = 0  # a class without images
    plot_confusion(counts.tolist(), [f"a long class name {n}" for n in range(classes)], "title", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 500


# The loss


def test_the_plain_loss_is_cross_entropy(tiny: Path) -> None:
    model = load_classifier(model_of(tiny), 7, seed=0).model.eval()
    loss = ClassifierLoss(model, 7, AugmentOptions())
    batch: Any = {"images": IMAGES, "labels": LABELS}
    assert torch.equal(loss(batch), F.cross_entropy(model(IMAGES), LABELS))
    smoothed = ClassifierLoss(model, 7, AugmentOptions(label_smoothing=0.1))
    expected = F.cross_entropy(model(IMAGES), LABELS, label_smoothing=0.1)
    assert smoothed(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_binary_loss_is_that_of_every_class(tiny: Path) -> None:
    model = load_classifier(model_of(tiny), 7, seed=0).model.eval()
    loss = ClassifierLoss(model, 7, AugmentOptions(bce_loss=True))
    expected = F.binary_cross_entropy_with_logits(model(IMAGES), F.one_hot(LABELS, 7).float())
    assert loss({"images": IMAGES, "labels": LABELS}).item() == pytest.approx(expected.item(), rel=1e-6)
    mixed = ClassifierLoss(model, 7, AugmentOptions(bce_loss=True, mixup=0.5))
    assert mixed({"images": IMAGES, "labels": LABELS}).isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_copies_is_timms(tiny: Path, smoothing: float) -> None:
    model = load_classifier(model_of(tiny), 7, seed=0).model.eval()
    copies = [IMAGES, IMAGES.flip(3), IMAGES * 0.5]
    batch: Any = {"images": torch.stack(copies, dim=1), "labels": LABELS}
    augment = AugmentOptions(aug_splits=3, jsd_loss=True, label_smoothing=smoothing)
    expected = JsdCrossEntropy(3, smoothing=smoothing)(model(torch.cat(copies)), LABELS)
    assert ClassifierLoss(model, 7, augment)(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = ClassifierLoss(model, 7, AugmentOptions(aug_splits=3))(batch)
    assert plain.item() == pytest.approx(F.cross_entropy(model(torch.cat(copies)), LABELS.repeat(3)).item(), rel=1e-5)


@pytest.mark.parametrize("resplit", [False, True])
def test_copies_are_those_of_timms_augmix_dataset(tiny: Path, resplit: bool) -> None:
    loaded = load_classifier(model_of(tiny), 5, seed=0)
    augment = AugmentOptions(aug_splits=3, auto_augment="rand-m9-inc1", random_erasing=0.999, resplit=resplit)
    splits: Any = SimpleNamespace(augment=None)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    found = {}
    for erasing in (0.999, 0.0):
        transform = loaded.training_transform(splits, replace(augment, random_erasing=erasing))
        seed_everything(3)
        found[erasing] = transform(picture)
    config = {**loaded.data_config, "is_training": True, "auto_augment": "rand-m9-inc1", "separate": True}
    del config["crop_pct"], config["crop_mode"]
    theirs = AugMixDataset(SimpleNamespace(transform=timm.data.create_transform(**config)), num_splits=3)
    theirs.dataset = [(theirs.dataset.transform(picture), 0)] if seed_everything(3) is None else []  # type: ignore[func-returns-value]
    assert torch.equal(found[0.0], torch.stack(theirs[0][0]))
    assert torch.equal(found[0.999][0], found[0.0][0]) == resplit
    assert not torch.equal(found[0.999][1], found[0.0][1])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"aug_splits": 1}, "--aug-splits must be 0, or 2 or more, got 1"),
        ({"jsd_loss": True}, "--jsd-loss needs --aug-splits"),
        ({"resplit": True}, "--resplit needs --aug-splits"),
        ({"aug_splits": 2, "mixup": 0.1}, "--mixup cannot be combined with --aug-splits"),
        ({"aug_splits": 2, "jsd_loss": True, "bce_loss": True}, "--bce-loss cannot be combined with --jsd-loss"),
        ({"aug_splits": 2, "no_aug": True}, "--no-aug cannot be combined with --aug-splits"),
    ],
)
def test_copies_that_do_not_fit_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        AugmentOptions(**given)


def test_drop_rates_are_those_of_training_alone(tiny: Path) -> None:
    plain, dropped = (
        load_classifier(replace(model_of(tiny), drop_path=rate, drop=rate), 5, seed=0) for rate in (0.0, 0.5)
    )
    assert torch.equal(plain.model.eval()(IMAGES), dropped.model.eval()(IMAGES)) and plain.code == dropped.code
    assert not torch.equal(plain.model.train()(IMAGES), dropped.model.train()(IMAGES))


@pytest.mark.parametrize("augment", [AugmentOptions(mixup=0.8), AugmentOptions(cutmix=1.0, label_smoothing=0.1)])
def test_mixing_leaves_the_batch_as_it_is(tiny: Path, augment: AugmentOptions) -> None:
    """An odd batch, as after skipping an unreadable image, drops one more image."""
    model = load_classifier(model_of(tiny), 7, seed=0).model
    images = IMAGES.clone()
    batch: Any = {"images": images, "labels": LABELS}
    assert ClassifierLoss(model, 7, augment)(batch).isfinite()
    assert torch.equal(images, IMAGES)


# Models and methods


def test_a_fresh_head_is_all_but_zero_and_the_same_again(tiny: Path) -> None:
    first, again = (load_classifier(model_of(tiny), 7, seed=3) for _ in range(2))
    assert first.fresh_head
    head = first.model.get_submodule("head")
    assert isinstance(head, torch.nn.Linear)
    assert 0 < head.weight.abs().max() < 0.01 and not head.bias.any()
    assert torch.equal(head.weight, again.model.get_submodule("head").weight)
    assert not load_classifier(model_of(tiny), 5, seed=3).fresh_head


def test_the_printed_code_makes_the_model(tiny: Path) -> None:
    for model in (ClassifierModel(model="test_vit", img_size=64), model_of(tiny)):
        loaded = load_classifier(model, 3, seed=4)
        scope: dict[str, Any] = {}
        exec("\n".join(loaded.code), scope)
        head = head_modules(loaded.model)[0]
        theirs, ours = scope["model"].state_dict(), loaded.model.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours if not name.startswith(head))


@pytest.mark.parametrize("method", ["randlora", "lora", "vera", "full", "linear-probe"])
def test_what_is_trained_and_what_is_saved(tiny: Path, method: str, tmp_path: Path) -> None:
    model = load_classifier(model_of(tiny), 3, seed=0).model
    rank = {"rank": 4} if method in ("randlora", "lora", "vera") else {}
    adaptation = adapt(model, settings_of(model_of(tiny), model, method, **rank))
    assert "head" in adaptation.report or method in ("full", "linear-probe")
    trained = dict(adaptation.parameters())
    assert {id(p) for p in trained.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any("head" in name for name in trained)
    assert all(name.startswith("head") for name in trained) == (method == "linear-probe")
    F.cross_entropy(model(IMAGES[:3]), LABELS[:3]).backward()
    assert adaptation.check_gradients() == []
    torch.optim.SGD(trained.values(), lr=0.1).step()
    adaptation.save(tmp_path / "file.safetensors")
    fresh = load_classifier(model_of(tiny), 3, seed=0).model
    adaptation.load(fresh, tmp_path / "file.safetensors")
    model.eval().requires_grad_(False)
    assert torch.equal(fresh.eval().requires_grad_(False)(IMAGES), model(IMAGES))
    scope: dict[str, Any] = {"model": load_classifier(model_of(tiny), 3, seed=0).model}
    exec("\n".join(adaptation.loading_code(tmp_path / "file.safetensors")), scope)
    assert torch.equal(scope["model"].eval().requires_grad_(False)(IMAGES), model(IMAGES))


def test_a_budget_becomes_the_nearest_rank(tiny: Path) -> None:
    model = load_classifier(model_of(tiny), 3, seed=0).model
    chosen = settings_of(model_of(tiny), model, "lora", budget=2000)
    assert (chosen.adapter.rank, chosen.adapter.alpha, chosen.adapter.budget) == (2, 4.0, None)
    adapted = sum(p.numel() for name, p in adapt(model, chosen).parameters() if "lora" in name)
    assert abs(adapted - 2000) <= 1024 / 2


def test_peft_is_refused_where_its_adapters_are_passed_by() -> None:
    """BEiT uses the weight of qkv directly, to add a bias that has no part for the keys."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    for method in ("lora", "vera"):
        model = timm.create_model("beit_base_patch16_224", **small)
        adaptation = adapt(model, settings_of(ClassifierModel(model="beit"), model, method, rank=2))
        F.cross_entropy(model(IMAGES), LABELS).backward()
        with pytest.raises(ValueError, match=r"no gradient reaches PEFT's adapters of blocks\.0\.attn\.qkv"):
            adaptation.check_gradients()


def test_load_peft_reads_no_other_file(tiny: Path) -> None:
    with pytest.raises(ValueError, match="not a file of PEFT adapters"):
        load_peft(timm.create_model("test_vit"), tiny / "model.safetensors")


PEFT_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 3.5}, "r must be an integer, got a number"),
    "another r": ({"r": 10**9}, "its tensors are not of rank 1000000000"),
    "peft_type": ({"peft_type": "LOHA"}, "peft_type must be LORA or VERA, got 'LOHA'"),
    "modules_to_save": ({"modules_to_save": True}, "modules_to_save must be a list or null, got true or false"),
    "a module": ({"modules_to_save": ["none"]}, r"1 of its layers are not in the model \(none\)"),
    "a pattern": ({"target_modules": "(a+)+$", "exclude_modules": "(a+)+$", "rank_pattern": {"(a+)+$": 3}}, ""),
}


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_settings_in_a_peft_file_are_checked_and_its_patterns_are_not_run(
    method: str, tiny: Path, tmp_path: Path
) -> None:
    chosen = ClassifierModel(model=f"local-dir:{tiny}", pretrained=True)
    model = load_classifier(chosen, 3, seed=0).model
    adaptation = adapt(model, settings_of(chosen, model, method, rank=2))
    path = tmp_path / "file.safetensors"
    adaptation.save(path)
    with safetensors.safe_open(path, "pt") as file:
        text = file.metadata()["randlora_vision.peft"]
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for changes, message in PEFT_CHANGES.values():
        settings = json.dumps({**json.loads(text), **changes})
        path.write_bytes(safetensors.torch.save(tensors, {"randlora_vision.peft": settings}))
        fresh = load_classifier(chosen, 3, seed=0).model
        if message:
            with pytest.raises(ValueError, match=message):
                load_peft(fresh, path)
        else:
            assert torch.equal(load_peft(fresh, path).eval()(IMAGES), adaptation.model.eval()(IMAGES))


# Data


def test_few_shots() -> None:
    labels = [0, 1, 1, 0, 1, 0, 2, 2]
    chosen = few_shot_indices(labels, 2, seed=0)
    assert sorted(labels[i] for i in chosen) == [0, 0, 1, 1, 2, 2] and len(set(chosen)) == 6
    assert chosen == few_shot_indices(labels, 2, seed=0)
    assert len({tuple(few_shot_indices(labels, 2, seed=seed)) for seed in range(9)}) > 1
    assert few_shot_indices(labels, 9, seed=0) == list(range(8))  # all that there are


def test_folders_without_splits_are_not_their_own_test(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "data")
    splits = read_data(DataOptions(data="timm:torch/image_folder", data_root=str(root)), NO_SKIPS)
    assert {name: len(images) for name, images in splits.images.items()} == {"train": 15, "val": 3}
    picture = LabelledImages(splits.images["val"], splits.labels["val"], lambda image: image, NO_SKIPS)[0]
    assert picture is not None and picture[0].mode == "RGB"


def test_a_dataset_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from files on disk: `datasets` accepts a folder instead of a repository name."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, count in (("train", 20), ("test", 6)):
        pictures = [b"broken" if i == 1 else png(Image.new("L", (20, 20), i)) for i in range(count)]
        rows = [{"image": {"bytes": picture}, "label": i % 2} for i, picture in enumerate(pictures)]
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    name = f"hfds/{tmp_path / 'hub'}"
    splits = read_data(DataOptions(data=f"timm:{name}", data_root=str(tmp_path / "cache")), NO_SKIPS)
    assert os.environ.pop("HF_DATASETS_OFFLINE") == "1"  # nothing may be fetched
    assert splits.class_names == ["cat", "dog"]
    assert [len(splits.images[name]) for name in ("train", "val", "test")] == [16, 4, 6]
    assert splits.labels["test"] == [0, 1] * 3
    test = LabelledImages(splits.images["test"], splits.labels["test"], lambda image: image, NO_SKIPS)
    assert test[1] is None and test[2] is not None  # the broken one is skipped
    assert test[2][0].getpixel((0, 0)) == (2, 2, 2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        read_data(DataOptions(data="timm:hfds/ORG/NAME"), NO_SKIPS)


# The model of the demo


def test_the_demo_model_is_cached_and_loads_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_classifier, "_PRETRAINING", Pretraining(steps=2))
    state = torch.random.get_rng_state()
    folder = demo_classifier.demo_model_folder(str(tmp_path))
    assert "pretraining" in capsys.readouterr().out
    assert torch.equal(torch.random.get_rng_state(), state)
    assert demo_classifier.demo_model_folder(str(tmp_path)) == folder
    assert capsys.readouterr().out == ""
    assert json.loads((folder / "settings.json").read_text())["pretraining"]["steps"] == 2
    loaded = load_classifier(model_of(folder), 10, seed=0)
    assert loaded.fresh_head and tuple(loaded.data_config["input_size"]) == (3, 32, 32)
