"""The tasks: pretrained weights and real pictures, the digits of the demo, and three linear maps of known rank.

Validation and test samples of a task are the same for every seed; the training samples, their order, the random bases
and the initial values follow the seed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.dinov2 import load_dinov2
from benchmarks.quality.problems import Classification, Problem, Prompts, Regression, Retrieval

_VALIDATION, _TEST = 200, 500
_BATCH = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RIDGE = 1e-2  # of the image projection, relative to the mean of the diagonal of the Gram matrix
_LINEAR = 128  # width of the linear maps
_RELATIVE_TARGET = 0.5  # norm of the change that is to be learned, relative to the weight


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: Name in the tables.
        score: What the figures are.
        steps: Optimiser steps of one run.
        ranks: RandLoRA's ranks of the budgets, from the smallest budget to the largest.
        make: (folder of the prepared data, seed) -> the problem.
        head_lr: Learning rate of the head, whatever the method.
        samples: Number of test samples behind a proportion; 0 if the score is none.
    """

    title: str
    score: str
    steps: int
    ranks: tuple[int, int, int]
    make: Callable[[Path, int], Problem]
    head_lr: float = 1e-3
    samples: int = _TEST


def targets_of(base: nn.Module) -> list[str]:
    """Return the names of the linear layers of a model without a head."""
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]


def _few_shot(shots: int, pixels: int) -> Callable[[Path, int], Problem]:
    def make(folder: Path, seed: int) -> Problem:
        images, labels = _mnist(folder, pixels)
        pool, tests = _parts(images, labels)
        chosen = _shots(labels, pool, shots, seed)
        return _classification(_dinov2(folder, pixels), images[chosen], labels[chosen], tests, seed)

    return make


def _emoji_categories(shots: int, pixels: int) -> Callable[[Path, int], Problem]:
    def make(folder: Path, seed: int) -> Problem:
        images, shifted, labels = (_emoji(folder, pixels)[name] for name in ("google", "twitter", "labels"))
        pool, tests = _parts(images, labels)
        other = _parts(shifted, labels)[1]["test"]
        chosen = _shots(labels, pool, shots, seed)
        tests = {**tests, "other artist": other}
        return _classification(_dinov2(folder, pixels), images[chosen], labels[chosen], tests, seed)

    return make


def _emoji_retrieval(pixels: int) -> Callable[[Path, int], Problem]:
    def make(folder: Path, seed: int) -> Problem:
        first, second = (_emoji(folder, pixels)[artist] for artist in ("google", "twitter"))
        texts = _texts(folder)["captions"]
        pool, tests = _parts(second, texts)
        tests = {**tests, "first artist": _parts(first, texts)[1]["test"]}
        base, head = _dinov2(folder, pixels), _aligned(folder, pixels)
        return Retrieval(base, head, second[pool], texts[pool], tests, _BATCH, seed)

    return make


def _emoji_prompts(shots: int, pixels: int) -> Callable[[Path, int], Problem]:
    def make(folder: Path, seed: int) -> Problem:
        first, second, labels = (_emoji(folder, pixels)[name] for name in ("google", "twitter", "labels"))
        pool, tests = _parts(second, labels)
        tests = {**tests, "first artist": _parts(first, labels)[1]["test"]}
        chosen = _shots(labels, pool, shots, seed)
        base, head = _dinov2(folder, pixels), _aligned(folder, pixels)
        texts = _texts(folder)["categories"]
        return Prompts(base, head, second[chosen], labels[chosen], tests, _BATCH, seed, texts=texts)

    return make


def _digits(folder: Path, seed: int) -> Problem:
    base, splits = _demo_digits()
    inputs, labels = splits["train"]
    head = _head(base, labels)
    return Classification(base, head, inputs, labels, {name: splits[name] for name in ("val", "test")}, 64, seed)


def _gaussian(rank: int) -> Callable[[torch.Generator], Tensor]:
    """Return a sampler of changes of a rank: products of two Gaussian matrices."""

    def sample(generator: torch.Generator) -> Tensor:
        left, right = (torch.randn(_LINEAR, rank, generator=generator) for _ in range(2))
        return left @ right.T

    return sample


def _flat(generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, all of whose singular values are equal."""
    return torch.linalg.qr(torch.randn(_LINEAR, _LINEAR, generator=generator)).Q


def _linear(sample: Callable[[torch.Generator], Tensor]) -> Callable[[Path, int], Problem]:
    def make(folder: Path, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(1000 + seed)
        layer = nn.Linear(_LINEAR, _LINEAR, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.randn(_LINEAR, _LINEAR, generator=generator) / _LINEAR**0.5)
        change = sample(generator)
        change *= _RELATIVE_TARGET * layer.weight.norm() / change.norm()
        scale = float(_LINEAR**0.5 / change.norm())  # answers whose change has unit mean square
        parts = {}
        for name, number in (("train", 4096), ("val", 1000), ("test", 1000)):
            inputs = torch.randn(number, _LINEAR, generator=generator)
            parts[name] = (inputs, inputs @ (layer.weight + change).T * scale)
        train = parts.pop("train")
        return Regression(nn.Sequential(layer.requires_grad_(True)), _Scaled(scale), *train, parts, 128, seed)

    return make


TASKS: dict[str, Task] = {
    "linear-full": Task(
        "linear map, Gaussian change", "explained", 300, (32, 16, 8), _linear(_gaussian(_LINEAR)), samples=0
    ),
    "linear-flat": Task("linear map, orthogonal change", "explained", 300, (32, 16, 8), _linear(_flat), samples=0),
    "linear-low": Task("linear map, rank-4 change", "explained", 300, (32, 16, 8), _linear(_gaussian(4)), samples=0),
    "digits": Task("inverted digits, demo ViT", "accuracy", 300, (32, 16, 8), _digits, 6e-3, 599),
    "digits-short": Task("inverted digits, demo ViT, 100 steps", "accuracy", 100, (32, 16, 8), _digits, 6e-3, 599),
    "mnist16": Task("MNIST, 16 shots, DINOv2-S", "accuracy", 60, (64, 32, 16), _few_shot(16, 28)),
    "mnist-all": Task("MNIST, 4,300 images, DINOv2-S", "accuracy", 200, (64, 32, 16), _few_shot(0, 28)),
    "emoji-categories": Task(
        "emoji categories, 16 shots, DINOv2-S", "accuracy", 60, (64, 32, 16), _emoji_categories(16, 42)
    ),
    "emoji-retrieval": Task(
        "emoji captions, DINOv2-S, MiniLM",
        "mean recall",
        60,
        (64, 32, 16),
        _emoji_retrieval(42),
    ),
    "emoji-prompts": Task(
        "emoji class prompts, DINOv2-S, MiniLM",
        "accuracy",
        60,
        (64, 32, 16),
        _emoji_prompts(16, 42),
    ),
}


class _Scaled(nn.Module):
    """Multiplies by a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def _classification(
    base: nn.Module, inputs: Tensor, labels: Tensor, tests: Mapping[str, tuple[Tensor, Tensor]], seed: int
) -> Problem:
    return Classification(base, _head(base, labels), inputs, labels, tests, _BATCH, seed)


def _head(base: nn.Module, labels: Tensor) -> nn.Linear:
    """Return a classifier that starts at zero."""
    head = nn.Linear(base.num_features, int(labels.max()) + 1)  # type: ignore[arg-type]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _parts(inputs: Tensor, answers: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the indices for training, and the samples for validation and test."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    val, test, pool = order.split([_VALIDATION, _TEST, len(order) - _VALIDATION - _TEST])
    return pool, {name: (inputs[part], answers[part]) for name, part in (("val", val), ("test", test))}


def _shots(labels: Tensor, pool: Tensor, shots: int, seed: int) -> Tensor:
    """Return the indices of `shots` samples per class, drawn from `pool`; of all of it if `shots` is 0."""
    if not shots:
        return pool
    shuffled = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    return torch.cat([shuffled[labels[shuffled] == label][:shots] for label in labels.unique()])


@cache
def _dinov2(folder: Path, pixels: int) -> nn.Module:
    return load_dinov2(folder, pixels)


@cache
def _mnist(folder: Path, pixels: int) -> tuple[Tensor, Tensor]:
    held = load_file(folder / "mnist.safetensors")
    images = held["images"].unsqueeze(1).expand(-1, 3, -1, -1)
    return _normalised(images, pixels), held["labels"].long()


@cache
def _emoji(folder: Path, pixels: int) -> dict[str, Tensor]:
    held = load_file(folder / "emoji.safetensors")
    pictures = {artist: _normalised(held[artist].permute(0, 3, 1, 2), pixels) for artist in ("google", "twitter")}
    return {**pictures, "labels": held["labels"]}


@cache
def _texts(folder: Path) -> dict[str, Tensor]:
    """Return MiniLM's features of the captions (N, D) and of the names of the categories (C, D)."""
    return load_file(folder / "captions.safetensors")


def _normalised(images: Tensor, pixels: int) -> Tensor:
    """Return images (N, 3, P, P) as DINOv2 takes them, from bytes of any size."""
    x = images.float() / 255
    if x.shape[-1] != pixels:
        x = F.interpolate(x, (pixels, pixels), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (x - mean) / std


@cache
def _aligned(folder: Path, pixels: int) -> nn.Linear:
    """Return the projection from image features to caption features, fitted to the first artist by ridge regression.

    It is frozen: Adam's first steps at the rate of a new classifier would undo the alignment. Without an adapter,
    nothing is trained.
    """
    images, base = _emoji(folder, pixels)["google"], _dinov2(folder, pixels).eval()
    texts = _texts(folder)["captions"]
    pool, _ = _parts(images, texts)
    with torch.no_grad():
        x = torch.cat([base(part) for part in images[pool].split(250)])
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram = x.T @ x
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, x.T @ texts[pool].double()).T.float()
    head = nn.Linear(x.shape[1] - 1, texts.shape[1])
    with torch.no_grad():
        head.weight.copy_(solution[:, :-1])
        head.bias.copy_(solution[:, -1])
    return head.requires_grad_(False)


@cache
def _demo_digits() -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """Return the ViT of the demo without its head, and the inverted digits by split."""
    import timm
    from torchvision.transforms.functional import normalize, to_tensor

    from randlora_vision.demos.classifier import demo_model_folder
    from randlora_vision.training.data.sources.digits import read_digits

    config = json.loads((demo_model_folder() / "config.json").read_text(encoding="utf-8"))
    overlay = {"file": str(demo_model_folder() / "model.safetensors")}
    model = timm.create_model(
        config["architecture"],
        pretrained=True,
        pretrained_cfg_overlay=overlay | {"num_classes": config["num_classes"]},
        num_classes=0,
        **config["model_args"],
    )
    data = read_digits(inverted=True)
    splits = {}
    for name, pictures in data.images.items():
        pixels = [normalize(to_tensor(picture), [0.5] * 3, [0.5] * 3) for picture in pictures]
        splits[name] = (torch.stack(pixels), torch.tensor([int(label) for label in data.labels[name]]))
    return model, splits
