"""The drift of the prior and the likeness of the subject, compared with what the pictures are made to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.dreambooth.options import ValidationOptions
from randlora_vision.training.dreambooth.prior import Encoder, PriorMeasure, balance, prior_measure
from randlora_vision.training.dreambooth.results import in_words, lost_words
from randlora_vision.training.dreambooth.task import _kind_of
from randlora_vision.training.harness.progress import best_of
from tests.training_helpers import write_tiny_vit


class Sampler:
    """Draws pictures of one grey, which depends on the prompt, its seed and the `shift` of the weights."""

    size = (8, 8)

    def __init__(self) -> None:
        self.shift = 0.0
        self.asked: list[tuple[str, int]] = []

    def encode(self, prompts: Any) -> Any:
        return list(prompts)

    def draw(self, encoded: Any, seeds: Any) -> Tensor:
        self.asked = list(zip(encoded, seeds, strict=True))
        noise = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        moved = [self.shift * ("sks" not in prompt) for prompt in encoded]
        return torch.stack([(image * 0.5 + shift) for image, shift in zip(noise, moved, strict=True)])


class Settings:
    """The settings that the measure reads."""

    def __init__(self, classes: tuple[str, ...] = (), **validation: Any) -> None:
        self.validation = ValidationOptions(**validation)
        self.subject = type("Subject", (), {"class_prompt": classes})
        self.training = type("Training", (), {"seed": 3})
        self.pipeline = type("Pipeline", (), {"train_text_encoder": False})


def measure(sampler: Sampler, settings: Any, images: Any = ()) -> PriorMeasure | None:
    anything: Any = sampler
    found = prior_measure(anything, settings, "a photo of sks dog", images, (255, 255, 255))
    if found is not None:
        found.begin()
    return found


def test_the_drift_is_that_of_the_pixels() -> None:
    sampler = Sampler()
    prior = measure(sampler, Settings(("a dog", "a cat"), validation_prompt=("x",), num_prior_images=3))
    assert prior is not None and prior() == {"prior_drift": 0.0, "prior_pictures": 3}
    assert [prompt for prompt, _ in sampler.asked] == ["a dog", "a cat", "a dog"]
    assert len({seed for _, seed in sampler.asked}) == 3
    sampler.shift = -0.25
    assert prior()["prior_drift"] == pytest.approx(0.25)
    assert lost_words({}, prior()) == [
        "prior:  3 pictures of other prompts differ by 0.250 from the base's at equal seeds (root mean square, pixels "
        "from 0 to 1)"
    ]


def test_what_was_lost_has_its_number_of_pictures_and_interval() -> None:
    after = {"loss": 0.5, "subject": 0.75, "subject_pictures": 16, "emoji_kept": 0.9, "emoji_pictures": 30}
    assert lost_words({"emoji_kept": 1.0}, after) == [
        "prior:  the right emoji for their names 100% -> 90% of 30 pictures (95% interval 74% to 97%)"
    ]
    assert "robots for the prompts of the subject 75% of 16" in in_words(after)


def test_what_is_asked_for_is_measured() -> None:
    sampler = Sampler()
    assert measure(sampler, Settings()) is None  # no pictures at all
    assert measure(sampler, Settings(validation_prompt=("x",), num_prior_images=0)) is None
    given = measure(sampler, Settings(("a dog",), prior_prompt=("a house",), num_prior_images=1))
    assert given is not None and [prompt for prompt, _ in sampler.asked] == ["a house"]
    plain = measure(sampler, Settings(validation_prompt=("x",)))
    assert plain is not None and len({prompt for prompt, _ in sampler.asked}) == 4
    with pytest.raises(ValueError, match="--prior-prompt needs --num-prior-images"):
        ValidationOptions(prior_prompt=("x",), num_prior_images=0)
    with pytest.raises(ValueError, match="--likeness-encoder no_such_model cannot be loaded"):
        Encoder("no_such_model", torch.device("cpu"))


def test_likenesses_are_cosines_of_the_encoder(tmp_path: Path) -> None:
    import timm

    name = f"local-dir:{write_tiny_vit(tmp_path / 'vit', 3)}"
    sampler: Any = Sampler()
    sampler.family = type("Family", (), {"device": torch.device("cpu")})
    torch.manual_seed(0)
    images = [Image.fromarray((torch.rand(8, 8, 3) * 255).byte().numpy()) for _ in range(2)]
    settings = Settings(prior_prompt=("a dog",), num_prior_images=3, likeness_encoder=name)
    prior = measure(sampler, settings, images)
    assert prior is not None
    first = prior()
    assert first["prior_likeness"] == pytest.approx(1) and first["prior_drift"] == 0
    sampler.shift = 0.4
    now = prior()
    assert 0 < now["prior_likeness"] < 0.999 and now["subject_likeness"] == first["subject_likeness"]
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_data_config({}, model=model)
    enlarge = Compose([Resize((16, 16), InterpolationMode.BICUBIC), Normalize(config["mean"], config["std"])])
    with torch.no_grad():
        of_images = model(torch.stack([enlarge(to_tensor(image)) for image in images]))
        of_pictures = model(enlarge(sampler.draw(["sks"] * 3, [20_003, 20_004, 20_005])))
    cosines = torch.nn.functional.cosine_similarity(of_pictures[:, None], of_images[None], dim=2)
    assert now["subject_likeness"] == pytest.approx(cosines.mean().item(), abs=1e-3)
    assert now["balance"] == pytest.approx(2 / (1 / now["prior_likeness"] + 1 / now["subject_likeness"]))
    assert "likeness to the subject" in in_words({**now, "loss": 0.5})
    assert "their likeness to the base's is" in lost_words({}, now)[0]


def test_what_is_measured_on_pictures_is_not_called_that_of_training_images() -> None:
    kinds = {metric: _kind_of(metric) for metric in ("loss", "prior_loss", "balance", "prior_drift", "emoji_kept")}
    assert [metric for metric, kind in kinds.items() if kind == "training-image"] == ["loss", "prior_loss"]
    assert set(kinds.values()) == {"training-image", "generated-picture"}


def test_the_best_state_has_learnt_and_kept() -> None:
    assert balance(1.0, 0.0) == 0 and balance(0.5, 0.5) == 0.5 and balance(0.9, 0.1) == pytest.approx(0.18)
    best = None
    for step, (learnt, kept) in enumerate([(0.0, 1.0), (0.8, 0.9), (1.0, 0.4)]):
        best = best_of(best, step, {"balance": balance(learnt, kept), "prior_drift": 1 - kept}, "balance")
    assert best is not None and best.step == 1
    smaller = best_of(best_of(None, 0, {"prior_drift": 0.2}, "prior_drift"), 1, {"prior_drift": 0.1}, "prior_drift")
    assert smaller.step == 1
