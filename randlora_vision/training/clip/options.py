"""The options of train_clip.py and their defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from randlora_vision.training.data.class_names import read_templates
from randlora_vision.training.data.known_data import known_data
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.sources import digits
from randlora_vision.training.harness.options import (
    FREE,
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
# The rates of the demo have the lowest validation loss (mean of three seeds) on a coarse grid, with steps of a factor
# of two or less. The others are the usual ones for pretrained CLIP models.
_DEMO_LR: Mapping[Method, float] = {"randlora": 2e-3, "lora": 9e-3, "full": 1.2e-3, "linear-probe": 1e-1}
_LR: Mapping[Method, float] = {"randlora": 1e-3, "lora": 1e-3, "full": 1e-5, "linear-probe": 1e-3}


@dataclass(frozen=True)
class ModelOptions:
    """The CLIP model."""

    model: str | None = None
    """An open_clip model: its name, hf-hub:ORG/REPO, local-dir:FOLDER, or the path of a model configuration (.json).
    By default, the tiny digits CLIP, or ViT-B-32 if --data is given."""
    pretrained: str | None = None
    """The pretrained weights: an open_clip tag, or the path of a checkpoint."""
    towers: Towers = "both"
    """Which towers to adapt. If the text tower is frozen, its features are computed once."""
    train_logit_scale: bool = False
    """Also train the logit scale, and with --loss siglip the logit bias of a SigLIP model, and save it in the same
    file. For RandLoRA and full fine-tuning only."""
    logit_scale_lr: float | None = None
    """Peak learning rate of the logit scale. Defaults to --lr."""
    cache_dir: str | None = None
    """Folder that caches the digits CLIP. Defaults to $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    def __post_init__(self) -> None:
        if self.logit_scale_lr is not None and not self.train_logit_scale:
            raise ValueError("--logit-scale-lr needs --train-logit-scale")
        if self.logit_scale_lr is not None and not self.logit_scale_lr > 0:
            raise ValueError(f"--logit-scale-lr must be above 0, got {self.logit_scale_lr}")


@dataclass(frozen=True)
class LossOptions:
    """What training minimises."""

    loss: Loss | None = None
    """class-prompts: cross entropy of the images against the text features of the class prompts. clip and siglip:
    contrastive losses between images and captions, with softmax or sigmoid, over all pairs of a step, including those
    of other processes and accumulated batches; for data with classes, the prompts are the captions. With siglip, a
    model without a logit bias uses the optimal one at each step. Defaults to class-prompts for data with classes and
    clip for data with captions."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate besides the task, before and after training."""

    retention_data: str | None = field(default=None, metadata=FREE)
    """Data on which to measure forgetting, in any form that --data takes, with the same templates: see --eval-split."""
    eval_only: bool = False
    """Do not train: evaluate the model, and also the model with --adapter if given."""
    adapter: str | None = None
    """A file written by this script with any method: --eval-only evaluates it, and --method linear-probe trains on the
    features of the model with it (RandLoRA, LoRA or full fine-tuning, whose weights then stay frozen)."""
    eval_scales: tuple[str, ...] = field(default=(), metadata=FREE)
    """Also evaluate and plot the model at these scales between base (0) and adapted (1), such as 0,0.25,0.5,0.75,1."""

    def __post_init__(self) -> None:
        scales = self.scales
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"--eval-scales must be finite numbers, got {', '.join(self.eval_scales)}")
        if scales and self.eval_only and self.adapter is None:
            raise ValueError(
                "--eval-scales with --eval-only needs --adapter: the base model alone has no adapter to scale"
            )

    @property
    def scales(self) -> list[float]:
        """The scales as floats. Raises ValueError for a value that is not a number."""
        words = [word for group in self.eval_scales for word in group.split(",") if word.strip()]
        try:
            return [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"--eval-scales must be numbers separated by commas: {error}") from error


@dataclass(frozen=True)
class ClipOptions:
    """All options of train_clip.py."""

    clip: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions, metadata=FREE)
    run: RunOptions = field(default_factory=RunOptions, metadata=FREE)

    def __post_init__(self) -> None:
        if self.adapter.target_modules and self.clip.towers != "both":
            raise ValueError("--towers and --target-modules both choose what is adapted: give one")
        if self.clip.train_logit_scale and self.adapter.method not in ("randlora", "full"):
            raise ValueError(f"--train-logit-scale: the file format of --method {self.adapter.method} cannot store it")
        evaluation = self.evaluation
        if evaluation.adapter and not evaluation.eval_only and self.adapter.method != "linear-probe":
            raise ValueError("--adapter needs --eval-only, or --method linear-probe to train on its features")
        if self.images.eval_split and not (evaluation.eval_only or evaluation.retention_data):
            raise ValueError("--eval-split needs --eval-only or --retention-data")
        if evaluation.eval_only and self.checkpoints.resume is not None:
            raise ValueError("--eval-only does not train: leave --resume out")
        if self.loss.loss in ("clip", "siglip") and self.adapter.method == "linear-probe":
            raise ValueError(
                f"--method linear-probe is a classifier: it cannot be trained with --loss {self.loss.loss}"
            )


def resolve(options: ClipOptions) -> ClipOptions:
    """Return `options` with the defaults filled in, except the rank of LoRA if a budget sets it."""
    embedded, method = options.images.embedded, options.adapter.method
    clip, images, adapter, training = options.clip, options.images, options.adapter, options.training
    if clip.model is None and not embedded:
        clip = replace(clip, model="ViT-B-32", pretrained=clip.pretrained or "laion2b_s34b_b79k")
    if clip.model is None and clip.pretrained:
        raise ValueError("--pretrained needs --model: the digits CLIP has its own weights")
    known = known_data(images.data)
    usual = digits.TEMPLATES if embedded else known.templates if known else ("a photo of a {}.",)
    templates = images.templates or usual
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
    """Return `options` with the loss filled in for data with captions or with classes.

    Raises ValueError if the loss or the method cannot be used with such data.
    """
    loss = options.loss.loss or ("clip" if captions else "class-prompts")
    if captions and loss == "class-prompts":
        raise ValueError("--loss class-prompts needs data with classes, but this has captions: choose clip or siglip")
    if captions and options.adapter.method == "linear-probe":
        raise ValueError("--method linear-probe is a classifier and needs data with classes, but this has captions")
    return replace(options, loss=LossOptions(loss))


def resolve_metric(options: ClipOptions, captions: bool) -> ClipOptions:
    """Return `options` with mean recall as the default metric for data with captions."""
    training = options.training
    if captions and training.best_metric == TrainingOptions.best_metric:
        training = replace(training, best_metric="mean_recall")
    return replace(options, training=training)


def model_title(options: ClipOptions) -> str:
    """Return a short name of the model, without the path of its folder."""
    return Path(options.clip.model or "").name.removesuffix(".json")
