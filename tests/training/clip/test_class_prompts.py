from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_vision.demos import clip as demo_clip
from randlora_vision.demos.clip import contrastive_loss, demo_model_folder
from randlora_vision.demos.pretraining import Pretraining
from randlora_vision.files.cache import cache_root
from randlora_vision.integrations._open_clip_models import LoadedClip, load_clip
from randlora_vision.training.clip.classifier import ClassPromptLoss, ClipClassifier, text_tower_learns
from randlora_vision.training.clip.load import load_classifier
from randlora_vision.training.clip.methods import adapt
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, ModelOptions, Towers
from randlora_vision.training.data.batches import evaluation_batches
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.sources import digits
from tests.training_helpers import NO_SKIPS, TINY_CONFIG, clip_settings, tiny_clip, write_tiny_clip

NAMES = ["zero", "one", "two", "three", "four", "five", "six"]
TEMPLATES = ["a photo of a {}.", "the {}.", "{}"]
IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def clip(folder: Path) -> LoadedClip:
    return tiny_clip(folder)


def batches(size: int = 4) -> list[Any]:
    return [{"images": x, "labels": y} for x, y in zip(IMAGES.split(size), LABELS.split(size), strict=True)]


# Evaluation


def test_accuracy_is_what_open_clip_computes(clip: LoadedClip) -> None:
    clip.model.eval()
    weights = open_clip.build_zero_shot_classifier(clip.model, clip.tokenize, NAMES, TEMPLATES)
    with torch.no_grad():
        logits = clip.model.logit_scale.exp() * clip.model.encode_image(IMAGES, normalize=True) @ weights
    ranks = (logits > logits.gather(1, LABELS[:, None])).sum(dim=1)
    results = ClipClassifier(clip, NAMES, TEMPLATES).scores(batches()).values
    assert results["top1"] == pytest.approx((ranks < 1).float().mean().item())
    assert results["top5"] == pytest.approx((ranks < 5).float().mean().item())
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    assert 0 < results["top5"] < 1


@pytest.mark.parametrize("classes", [3, 5])
def test_five_classes_or_fewer_have_no_top5_which_would_be_100_percent(clip: LoadedClip, classes: int) -> None:
    batch = [{"images": IMAGES[:3], "labels": LABELS[:3]}]
    assert set(ClipClassifier(clip, NAMES[:classes], TEMPLATES).scores(batch).values) == {"top1", "loss", "samples"}


def test_evaluation_reads_a_split_once(clip: LoadedClip) -> None:
    data = digits.read_digits(range(2)).select("val", clip.eval_transform, NO_SKIPS)
    results = ClipClassifier(clip, NAMES[:2], TEMPLATES).scores(evaluation_batches(data, 16, 0)).values
    hits = results["top1"] * len(data)
    assert hits == pytest.approx(round(hits))


# Text features


def count_texts(clip: LoadedClip) -> list[int]:
    counts: list[int] = []
    encode = clip.model.encode_text
    clip.model.encode_text = lambda tokens, normalize: (counts.append(len(tokens)), encode(tokens, normalize))[1]
    return counts


def test_features_of_a_frozen_text_tower_are_computed_once(clip: LoadedClip) -> None:
    clip.model.visual.requires_grad_(True)
    assert not text_tower_learns(clip.model)
    counts = count_texts(clip)
    classifier = ClipClassifier(clip, NAMES, TEMPLATES, "sample")
    for _ in range(3):
        classifier.train()(IMAGES)
        classifier.scores(batches())
    assert sum(counts) == len(NAMES) * len(TEMPLATES)


def test_features_of_a_learning_text_tower_follow_it(clip: LoadedClip) -> None:
    clip.model.transformer.requires_grad_(True)
    assert text_tower_learns(clip.model)
    classifier = ClipClassifier(clip, NAMES, TEMPLATES)
    before = classifier.predict(IMAGES)
    with torch.no_grad():
        clip.model.text_projection.mul_(torch.linspace(0.5, 2, TINY_CONFIG["embed_dim"]))
    assert not torch.allclose(classifier.predict(IMAGES), before)


def test_in_training_one_template_a_class_is_drawn_or_all_are_averaged(clip: LoadedClip) -> None:
    clip.model.transformer.requires_grad_(True)
    counts = count_texts(clip)
    ClipClassifier(clip, NAMES, TEMPLATES, "sample").train()(IMAGES)
    ClipClassifier(clip, NAMES, TEMPLATES, "average").train()(IMAGES)
    assert counts == [len(NAMES), len(NAMES) * len(TEMPLATES)]


def test_the_probe_starts_as_the_prompts(clip: LoadedClip) -> None:
    prompts, probe = ClipClassifier(clip, NAMES, TEMPLATES), ClipClassifier(clip, NAMES, TEMPLATES, probe=True)
    torch.testing.assert_close(probe.predict(IMAGES), prompts.predict(IMAGES))


def test_class_names_may_hold_braces(clip: LoadedClip) -> None:
    ClipClassifier(clip, ["{0}", "a{b"], TEMPLATES)


# Methods


@pytest.mark.parametrize("towers", ["vision", "text", "both"])
@pytest.mark.parametrize("method", ["randlora", "lora", "full", "linear-probe"])
def test_what_is_trained_learns_is_saved_and_loads(folder: Path, tmp_path: Path, method: Any, towers: Towers) -> None:
    clip = tiny_clip(folder)
    options = clip_settings(
        ClipOptions(
            clip=ModelOptions(model="tiny", towers=towers),
            images=ImageOptions(prompts="average"),
            adapter=ClipAdapterOptions(method=method, rank=4),
        )
    )
    plain = ClipClassifier(tiny_clip(folder), NAMES, options.images.templates).predict(IMAGES)
    classifier, adaptation = adapt(clip, NAMES, options)
    assert classifier is not None
    torch.testing.assert_close(classifier.predict(IMAGES), plain, rtol=1e-4, atol=1e-4)

    optimizer = torch.optim.AdamW([p for _, p in adaptation.parameters()], lr=1e-3)
    loss = ClassPromptLoss(classifier)
    losses = []
    for step in range(5):
        classifier.train()
        value = loss({"images": IMAGES, "labels": LABELS})
        value.backward()
        if step == 0:
            assert adaptation.check_gradients() == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    trained = {id(p) for _, p in adaptation.parameters()}
    assert {id(p) for p in classifier.parameters() if p.requires_grad} == trained
    if method != "linear-probe":
        sides = {name.startswith("visual.") for name, p in clip.model.named_parameters() if p.requires_grad}
        assert sides == {"vision": {True}, "text": {False}, "both": {True, False}}[towers]

    path = tmp_path / "adapter.safetensors"
    adaptation.save(path)
    classifier.requires_grad_(False)
    fresh = load_classifier(tiny_clip(folder), NAMES, options, path)
    assert fresh is not None
    assert torch.equal(fresh.predict(IMAGES), classifier.predict(IMAGES))
    assert not torch.allclose(classifier.predict(IMAGES), plain)


def test_the_printed_code_loads_the_file(folder: Path, tmp_path: Path) -> None:
    for method in ("randlora", "lora", "full", "linear-probe"):
        options = clip_settings(ClipOptions(adapter=ClipAdapterOptions(method=method, rank=None)))
        clip = tiny_clip(folder)
        classifier, adaptation = adapt(clip, NAMES, options)
        assert classifier is not None
        with torch.no_grad():
            for _, parameter in adaptation.parameters():
                parameter.add_(0.01)
        adaptation.save(tmp_path / f"{method}.safetensors")
        scope: dict[str, Any] = {"model": tiny_clip(folder).model.eval(), "images": IMAGES}
        exec("\n".join(adaptation.loading_code(tmp_path / f"{method}.safetensors")), scope)
        with torch.no_grad():
            expected = clip.model.eval().encode_image(IMAGES)
            torch.testing.assert_close(scope["model"].encode_image(IMAGES), expected)
        if method == "linear-probe":
            assert torch.equal(scope["class_features"], classifier.class_features)


def test_token_tables_are_not_fine_tuned(clip: LoadedClip) -> None:
    _, adaptation = adapt(clip, NAMES, clip_settings(ClipOptions(adapter=ClipAdapterOptions(method="full"))))
    names = [name for name, _ in adaptation.parameters()]
    assert "token_embedding.weight" not in names and "logit_scale" not in names
    assert "text_projection" in names and "visual.conv1.weight" in names


def test_loras_budget_is_met_as_nearly_as_its_rank_allows(folder: Path) -> None:
    def numbers(**adapter: Any) -> int:
        clip = tiny_clip(folder)
        options = clip_settings(ClipOptions(adapter=ClipAdapterOptions(**adapter)), clip.model)
        assert options.adapter.rank is not None and options.adapter.budget is None
        _, adaptation = adapt(clip, NAMES, options)
        return sum(p.numel() for _, p in adaptation.parameters())

    one = numbers(method="lora", rank=1)
    budget = numbers(method="randlora", rank=8)
    assert abs(numbers(method="lora", budget=budget) - budget) <= max(one // 2, one - budget)


def test_a_gradient_that_is_not_finite_names_its_parameter(clip: LoadedClip) -> None:
    for method in ("lora", "full"):
        _, adaptation = adapt(
            SimpleNamespace(**{**vars(clip), "model": clip.model}),  # type: ignore[arg-type]
            NAMES,
            clip_settings(ClipOptions(adapter=ClipAdapterOptions(method=method))),
        )
        (name, first), *others = adaptation.parameters()
        for _, parameter in others:
            parameter.grad = torch.ones_like(parameter)
        first.grad = torch.full_like(first, torch.nan)
        with pytest.raises(ValueError, match=f"{name}.*is not finite|reaches the LoRA"):
            adaptation.check_gradients()


# Loading models


def test_random_weights_are_the_same_at_every_call(folder: Path) -> None:
    name = str(folder / "tiny-test-clip.json")
    first, again, other = load_clip(name, None, 0), load_clip(name, None, 0), load_clip(name, None, 1)
    assert not first.has_weights
    key = "visual.proj"
    assert torch.equal(first.model.state_dict()[key], again.model.state_dict()[key])
    assert not torch.equal(first.model.state_dict()[key], other.model.state_dict()[key])


def test_a_configuration_file_with_a_checkpoint_is_the_folders_model(folder: Path) -> None:
    loaded = load_clip(str(folder / "tiny-test-clip.json"), str(folder / "open_clip_model.safetensors"), 0)
    for name, tensor in tiny_clip(folder).model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert loaded.has_weights


def test_weights_of_another_image_size_are_resized_as_by_open_clip(folder: Path, tmp_path: Path) -> None:
    name, path = str(folder / "tiny-test-clip.json"), str(folder / "open_clip_model.safetensors")
    loaded = load_clip(name, path, 0, {"force_image_size": 32}).model.state_dict()
    expected = open_clip.create_model("tiny-test-clip", pretrained=path, force_image_size=32).state_dict()
    assert loaded["visual.positional_embedding"].shape != load_file(path)["visual.positional_embedding"].shape
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    lacking = {name: tensor for name, tensor in load_file(path).items() if name != "visual.proj"}
    save_file(lacking, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors.*Missing key.*visual.proj"):
        load_clip(name, str(tmp_path / "x.safetensors"), 0, {"force_image_size": 32})


def test_only_weights_that_a_file_lacks_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            drawn.extend(word for word in ("normal_", "uniform_") if word in str(func))
            return func(*args, **(kwargs or {}))

    with Watched():
        load_clip(f"local-dir:{folder}", None, 0)
    assert not drawn
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: None)
    with Watched():
        model = load_clip(f"local-dir:{folder}", None, 3).model
    assert drawn
    expected = load_clip(str(folder / "tiny-test-clip.json"), None, 3).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-B-23", None, "open_clip has no model 'ViT-B-23'; close matches: ViT-B-32"),
        ("vit-b-32", None, "close matches: .*ViT-B-32"),
        ("RN50", "opnai", "'opnai' is neither a file nor a tag of RN50; close matches: openai"),
        ("RN50", "zzz", "it has: openai, "),
        ("{folder}/tiny-test-clip.json", "{folder}/other.safetensors", "cannot load the model '.*' with weights"),
        ("{folder}/tiny-test-clip.json", "{folder}/open_clip_config.json", "cannot load the model '.*' with weights"),
        ("local-dir:{folder}/nowhere", None, "cannot load the model"),
        ("local-dir:{folder}", "openai", "come with their own weights"),
        ("{folder}/open_clip_config.json", None, "is not an open_clip model configuration: it lacks embed_dim"),
        ("{folder}/nowhere.json", None, "No such file"),
        ("{folder}/RN50.json", None, "already has another model named 'RN50'"),
        ("{folder}/broken.json", None, "is not valid JSON"),
    ],
)
def test_model_mistakes_are_explained(folder: Path, name: str, pretrained: str | None, expected: str) -> None:
    (folder / "RN50.json").write_text(json.dumps(TINY_CONFIG))
    (folder / "broken.json").write_text("{")
    save_file({"weight": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        load_clip(name.format(folder=folder), pretrained and pretrained.format(folder=folder), 0)


# The base model of the demo


def test_the_contrastive_loss_is_clips_where_captions_differ() -> None:
    image, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    scale = torch.tensor(5.0)
    expected = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(contrastive_loss(image, text, scale, torch.arange(6)), expected)


def test_pairs_with_equal_captions_are_not_negatives() -> None:
    """Two images with one caption, perfectly matched: only the multi-positive loss is at its minimum."""
    features = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1).requires_grad_()
    captions = torch.tensor([0, 0, 1])
    contrastive_loss(features, features.detach(), torch.tensor(50.0), captions).backward()
    assert features.grad is not None and features.grad.abs().max() < 1e-5


def test_the_demo_model_is_cached_and_loads_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_clip, "_PRETRAINING", Pretraining(steps=2))
    state = torch.random.get_rng_state()
    folder = demo_model_folder(str(tmp_path))
    assert "pretraining" in capsys.readouterr().out
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(path.name for path in folder.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "settings.json",
    ]
    assert list(tmp_path.iterdir()) == [folder]
    stamp = (folder / "open_clip_model.safetensors").stat().st_mtime_ns
    assert demo_model_folder(str(tmp_path)) == folder
    assert (folder / "open_clip_model.safetensors").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == ""

    clip = load_clip(f"local-dir:{folder}", None, 0)
    assert clip.tokenize(["a photo"]).shape == (1, 16)
    assert clip.eval_transform(digits.read_digits().images["test"][0]).shape == (3, 32, 32)

    monkeypatch.setattr(demo_clip, "_PRETRAINING", Pretraining(steps=1))
    assert demo_model_folder(str(tmp_path)) != folder  # other settings give another model


def test_a_failed_pretraining_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_clip, "_pretrain", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model_folder(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_where_demo_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANDLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/randlora_vision")
    monkeypatch.setenv("RANDLORA_CACHE", "/variable")
    assert cache_root() == Path("/variable")
    assert cache_root("/flag") == Path("/flag")


def test_the_image_size_and_the_augmentation_can_be_set(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    clip = load_clip(f"local-dir:{folder}", None, 0, {"force_image_size": 32}, {"scale": (0.25, 0.5)})
    picture = Image.new("RGB", (50, 40))
    assert clip.eval_transform(picture).shape == clip.train_transform(picture).shape == (3, 32, 32)
    assert "scale=(0.25, 0.5)" in str(clip.train_transform)


def test_the_preprocessing_and_the_dropped_patches_can_be_set(tmp_path: Path) -> None:
    words = {"image_mean": (0.25, 0.25, 0.5), "image_std": (0.5, 0.5, 0.5), "image_resize_mode": "squash"}
    clip = load_clip(f"local-dir:{write_tiny_clip(tmp_path / 'clip')}", None, 0, {**words, "force_patch_dropout": 0.5})
    picture = Image.new("RGB", (50, 20))
    picture.paste((255, 255, 255), (48, 0, 50, 20))  # cut off unless the picture is squashed
    pixels = clip.eval_transform(picture)
    torch.testing.assert_close(pixels[:, 8, 0], torch.tensor([-0.5, -0.5, -1.0]))
    assert pixels[0, 8, -1] > 0
    images = torch.randn(1, 3, 16, 16)
    model: Any = clip.model.train()
    assert len({tuple(model.encode_image(images)[0].tolist()) for _ in range(20)}) > 1
    model.eval()
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    resnet = {**TINY_CONFIG["vision_cfg"], "layers": [1, 1, 1, 1], "width": 8}
    folder = tmp_path / "resnet"
    folder.mkdir()
    (folder / "tiny-test-resnet.json").write_text(json.dumps({**TINY_CONFIG, "vision_cfg": resnet}))
    with pytest.raises(ValueError, match="--force-patch-dropout: the model .* does not drop patches"):
        load_clip(str(folder / "tiny-test-resnet.json"), None, 0, {"force_patch_dropout": 0.5})
