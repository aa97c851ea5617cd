"""The options of train_clip.py, and what the ones left out become."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from randlora_vision.training.data.class_names import read_templates
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.sources import digits
from randlora_vision.training.harness.options import (
    AdapterOptions,
    CheckpointOptions,
    Method,
    RateOptions,
    RunOptions,
    SpeedOptions,
    TrainingOptions,
)

Towers = Literal["vision", "text", "both"]
Loss = Literal["class-prompts", "clip", "siglip"]
# The demo's have the lowest validation loss, mean of three seeds, on a coarse grid (of a factor of two or
# less). The others are the usual ones for pretrained CLIP models.
_DEMO_LR: Mapping[Method, float] = {"randlora": 2e-3, "lora": 9e-3, "full": 1.2e-3, "linear-probe": 1e-1}
_LR: Mapping[Method, float] = {"randlora": 1e-3, "lora": 1e-3, "full": 1e-5, "linear-probe": 1e-3}


@dataclass(frozen=True)
class ModelOptions:
    """The CLIP model."""

    model: str | None = None
    """A model of open_clip: its name, hf-hub:ORG/REPO, local-dir:FOLDER, or the path of a model
    configuration (.json). Left out: the tiny digits CLIP, or ViT-B-32 where --data is given."""
    pretrained: str | None = None
    """Its weights: one of open_clip's tags, or the path of a checkpoint."""
    towers: Towers = "both"
    """The tower or towers that are adapted. With the text tower frozen its features are computed once."""
    train_logit_scale: bool = False
    """RandLoRA and full fine-tuning: train the scale of the logits too (with --loss siglip also a SigLIP model's
    bias), and save it with the rest."""
    logit_scale_lr: float | None = None
    """Its peak learning rate. Left out: --lr."""
    cache_dir: str | None = None
    """Where the digits CLIP is kept. Left out: $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    def __post_init__(self) -> None:
        if self.logit_scale_lr is not None and not self.train_logit_scale:
            raise ValueError("--logit-scale-lr needs --train-logit-scale")
        if self.logit_scale_lr is not None and not self.logit_scale_lr > 0:
            raise ValueError(f"--logit-scale-lr must be above 0, got {self.logit_scale_lr}")


@dataclass(frozen=True)
class LossOptions:
    """What training minimises."""

    loss: Loss | None = None
    """class-prompts: the cross entropy of images against the features of their classes' prompts. clip and siglip:
    images and captions against each other, by softmax or sigmoid, over all pairs of a step, those of
    other processes and accumulated batches included; the captions of data with classes are the prompts. For
    siglip a model without a logit bias gets the best one at each step. Left out: class-prompts for data with
    classes, clip for captions."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured beside the task, before and after."""

    retention_data: str | None = None
    """Data, given in the ways of --data, on which forgetting is measured: its test split, by the same templates."""
    eval_only: bool = False
    """Train nothing: measure the model, and the model with --adapter where that is given."""
    adapter: str | None = None
    """A file that this script wrote, of any method: --eval-only measures it, and --method linear-probe learns on
    the features of the model with it (RandLoRA, LoRA or full fine-tuning, which then stay as they are)."""
    eval_scales: tuple[str, ...] = ()
    """Measure part of the way from the base model to the adapted one as well, and draw it: 0,0.25,0.5,0.75,1."""

    def __post_init__(self) -> None:
        scales = self.scales
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"--eval-scales must be finite numbers, got {', '.join(self.eval_scales)}")
        if scales and self.eval_only and self.adapter is None:
            raise ValueError("--eval-scales with --eval-only needs --adapter: the base model alone has no scale")

    @property
    def scales(self) -> list[float]:
        """The scales as numbers; raises ValueError for a word that is none."""
        words = [word for group in self.eval_scales for word in group.split(",") if word.strip()]
        try:
            return [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"--eval-scales takes numbers with commas between them: {error}") from error


@dataclass(frozen=True)
class ClipOptions:
    """Everything that train_clip.py can be told."""

    clip: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.adapter.target_modules and self.clip.towers != "both":
            raise ValueError("--towers and --target-modules both choose what is adapted: give one")
        if self.clip.train_logit_scale and self.adapter.method not in ("randlora", "full"):
            raise ValueError(f"--train-logit-scale: a file of --method {self.adapter.method} has no place for it")
        evaluation = self.evaluation
        if evaluation.adapter and not evaluation.eval_only and self.adapter.method != "linear-probe":
            raise ValueError("--adapter needs --eval-only, or --method linear-probe to learn on its features")
        if evaluation.eval_only and self.checkpoints.resume is not None:
            raise ValueError("--eval-only trains nothing: leave --resume out")
        if self.loss.loss in ("clip", "siglip") and self.adapter.method == "linear-probe":
            raise ValueError(f"--method linear-probe is a classifier: it cannot learn from --loss {self.loss.loss}")


def resolve(options: ClipOptions) -> ClipOptions:
    """Return `options` with a value for everything left out, but for LoRA's rank when a budget sets it."""
    embedded, method = options.images.embedded, options.adapter.method
    clip, images, adapter, training = options.clip, options.images, options.adapter, options.training
    if clip.model is None and not embedded:
        clip = replace(clip, model="ViT-B-32", pretrained=clip.pretrained or "laion2b_s34b_b79k")
    if clip.model is None and clip.pretrained:
        raise ValueError("--pretrained needs --model: the digits CLIP has its own weights")
    templates = images.templates or (digits.TEMPLATES if embedded else ("a photo of a {}.",))
    images = replace(images, templates=read_templates(templates))
    if adapter.rank is None and adapter.budget is None and method in ("randlora", "lora"):
        adapter = replace(adapter, rank=8 if method == "lora" else 16 if embedded else 32)
    if adapter.alpha is None and adapter.rank is not None:
        adapter = replace(adapter, alpha=float((2 if method == "lora" else 20) * adapter.rank))
    lr = training.lr or (_DEMO_LR if embedded else _LR)[method]
    steps = training.steps or (250 if embedded else 1000)
    if clip.train_logit_scale:
        clip = replace(clip, logit_scale_lr=clip.logit_scale_lr or lr)
    return replace(
        options,
        clip=clip,
        images=images,
        adapter=adapter,
        training=replace(training, lr=lr, steps=steps),
    )


def resolve_loss(options: ClipOptions, captions: bool) -> ClipOptions:
    """Return `options` with the loss for data with captions, or with classes.

    Raises ValueError where the loss or the method cannot be for such data.
    """
    loss = options.loss.loss or ("clip" if captions else "class-prompts")
    if captions and loss == "class-prompts":
        raise ValueError("--loss class-prompts needs data with classes, but this has captions: choose clip or siglip")
    if captions and options.adapter.method == "linear-probe":
        raise ValueError("--method linear-probe is a classifier and needs data with classes, but this has captions")
    return replace(options, loss=LossOptions(loss))


def resolve_metric(options: ClipOptions, captions: bool) -> ClipOptions:
    """Return `options` with the metric that data with captions has, where that of data with classes was the default."""
    training = options.training
    if captions and training.best_metric == TrainingOptions.best_metric:
        training = replace(training, best_metric="mean_recall")
    return replace(options, training=training)


def model_title(options: ClipOptions) -> str:
    """Return a short name of the model: without the folders that lead to it."""
    return Path(options.clip.model or "").name.removesuffix(".json")
