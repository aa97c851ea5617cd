"""The options of train_clip.py, as given and with the defaults filled in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from randlora_vision.names import short_name
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.harness.options import (
    AdapterOptions,
    CheckpointOptions,
    HubOptions,
    Method,
    RateOptions,
    RunOptions,
    SpeedOptions,
    Training,
    TrainingOptions,
    require_digits_cache,
    require_epoch,
)
from randlora_vision.training.option_fields import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_1,
    FREE,
    RARE,
    Options,
    flag,
    named_values,
    needs,
)

Towers = Literal["vision", "text", "both"]
Loss = Literal["class-prompts", "clip", "siglip"]


def parse_augmentation(words: Sequence[str]) -> dict[str, Any]:
    """Return open_clip's augmentation settings, written as KEY=VALUE; raise ValueError for one that it lacks."""
    from open_clip.transform import AugmentationCfg

    known = [member.name for member in fields(AugmentationCfg)]
    settings = named_values("--aug-cfg", words)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--aug-cfg {name}={value}: expected NAME=VALUE with a name from {', '.join(known)}")
        if isinstance(value, str):
            raise ValueError(f"--aug-cfg {name}={value}: {value!r} is not a number, True, False or (a, b)")
    return settings


@dataclass(frozen=True)
class ModelOptions(Options):
    """The CLIP model."""

    model: str | None = None
    """An open_clip model: its name, hf-hub:ORG/REPO, local-dir:FOLDER, or the path of a model configuration (.json).
    Default: the tiny digits CLIP, or ViT-B-32 if --data is given."""
    pretrained: str | None = None
    """The pretrained weights: an open_clip tag, or the path of a checkpoint."""
    force_image_size: int | None = field(default=None, metadata=RARE | AT_LEAST_1)
    """Image size in pixels (one side); position embeddings are interpolated. Default: that of the model."""
    aug_cfg: tuple[str, ...] = field(default=(), metadata=RARE)
    """open_clip's augmentation settings, such as scale=(0.4,1.0) color_jitter=0.3. Default: those of the model."""
    image_mean: tuple[float, float, float] | None = field(default=None, metadata=RARE)
    """The mean that is subtracted from pixels between 0 and 1. Default: that of the model, as for the next three."""
    image_std: tuple[float, float, float] | None = field(default=None, metadata=RARE)
    """The standard deviation by which they are divided."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = field(default=None, metadata=RARE)
    """How images are resized."""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = field(default=None, metadata=RARE)
    """Which side is resized to the image size for evaluation; squash: both."""
    force_patch_dropout: float | None = field(default=None, metadata=RARE | BELOW_1)
    """Fraction of the patches of an image that a vision transformer does not see in training. Default: that of the
    model."""
    towers: Towers = "both"
    """Which towers to adapt. If the text tower is frozen, its features are computed once."""
    train_logit_scale: bool = field(default=False, metadata=RARE)
    """Also train the logit scale, and with --loss siglip the logit bias of a SigLIP model, and save it in the same
    file."""
    logit_scale_lr: float | None = field(default=None, metadata=RARE | ABOVE_0 | needs("train_logit_scale"))
    """Peak learning rate of the logit scale. Default: --lr."""
    cache_dir: str | None = field(default=None, metadata=RARE)
    """Folder that caches the digits CLIP. Default: $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    @property
    def augmentation(self) -> dict[str, Any]:
        """The augmentation settings by name. Raises ValueError for one that open_clip does not have."""
        return parse_augmentation(self.aug_cfg) if self.aug_cfg else {}

    @property
    def changes(self) -> dict[str, Any]:
        """The arguments of open_clip's factory that change a model or its preprocessing, where given."""
        names = ("image_mean", "image_std", "image_interpolation", "image_resize_mode")
        given = {name: getattr(self, name) for name in ("force_image_size", "force_patch_dropout", *names)}
        return {name: value for name, value in given.items() if value is not None}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_digits_cache(self.cache_dir, self.model)
        if self.model is None and (self.changes or self.aug_cfg):
            raise ValueError(f"{flag(next(iter(self.changes), 'aug_cfg'))} needs --model")
        _ = self.augmentation  # raises for a wrong one


@dataclass(frozen=True)
class LossOptions(Options):
    """What training minimises."""

    loss: Loss | None = None
    """Cross entropy over the classes, or a contrastive loss. class-prompts: cross entropy of the images against the
    text features of the class prompts. clip and siglip: contrastive losses between images and captions, with softmax or
    sigmoid, over all pairs of a step, including those of other processes and accumulated batches; for data with
    classes, the prompts are the captions. With siglip, a model without a logit bias uses the optimal one at each step.
    Default: class-prompts for data with classes, clip for data with captions."""


@dataclass(frozen=True)
class ClipAdapterOptions(AdapterOptions):
    """The training method and its adapter."""

    method: Method = "randlora"
    """RandLoRA, or LoRA, DoRA, VeRA or NoLA on the same weights, or full fine-tuning, or a linear classifier on frozen
    features."""
    probe_lr: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Also train the linear classifier, from the class prompts on, at this peak rate, and save it in the same file. It
    takes the place of the text tower: needs --towers vision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_lr is not None and self.method == "linear-probe":
            raise ValueError("--probe-lr is for an adapter: --method linear-probe trains the classifier alone, at --lr")
        if self.alpha is not None and self.method in ("vera", "nola"):
            raise ValueError(f"--alpha: --method {self.method} has no scale, leave it out")


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """What to evaluate besides the task, before and after training."""

    retention_data: str | None = field(default=None, metadata=FREE | RARE)
    """Data on which to measure forgetting, in any form that --data takes, with the same templates: see --eval-split."""
    retention_class_names: str | None = field(default=None, metadata=RARE | needs("retention_data"))
    """Class names of --retention-data, in any form that --class-names takes."""
    eval_only: bool = False
    """Do not train: evaluate the model, and also the model with --adapter if given."""
    adapter: str | None = None
    """A file written by this script with any method: --eval-only evaluates it, and --method linear-probe trains on the
    features of the model with it (RandLoRA, LoRA or full fine-tuning, whose weights then stay frozen)."""
    eval_scales: tuple[str, ...] = field(default=(), metadata=FREE | RARE)
    """Also evaluate and plot the model at these scales between base (0) and adapted (1), such as 0,0.25,0.5,0.75,1."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    adapter: ClipAdapterOptions = field(default_factory=ClipAdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions, metadata=FREE)
    run: RunOptions = field(default_factory=RunOptions, metadata=FREE)
    hub: HubOptions = field(default_factory=HubOptions, metadata=FREE)

    def __post_init__(self) -> None:
        if self.adapter.target_modules and self.clip.towers != "both":
            raise ValueError("--towers and --target-modules both choose what is adapted: give only one")
        if self.clip.train_logit_scale and self.adapter.method == "linear-probe":
            raise ValueError("--train-logit-scale: the file format of --method linear-probe cannot store it")
        if self.adapter.probe_lr is not None and self.clip.towers != "vision":
            raise ValueError("--probe-lr: the classifier takes the place of the text tower, give --towers vision too")
        if self.images.embedded and self.clip.model is None and self.clip.pretrained:
            raise ValueError("--pretrained needs --model: the digits CLIP has its own weights")
        evaluation = self.evaluation
        if evaluation.adapter and not evaluation.eval_only and self.adapter.method != "linear-probe":
            raise ValueError("--adapter needs --eval-only, or --method linear-probe to train on its features")
        if self.images.eval_split and not (evaluation.eval_only or evaluation.retention_data):
            raise ValueError("--eval-split needs --eval-only or --retention-data")
        require_epoch(self.images.streaming, self.training)
        if evaluation.eval_only and self.images.streaming:
            raise ValueError("--streaming is for training: give --eval-only data whose images are counted")
        if evaluation.eval_only and self.adapter.init_adapter is not None:
            raise ValueError("--eval-only does not train: give --adapter instead of --init-adapter")
        if evaluation.eval_only and self.checkpoints.resume is not None:
            raise ValueError("--eval-only does not train: leave --resume out")
        if self.loss.loss in ("clip", "siglip"):
            probe = self.adapter.method == "linear-probe"
            if probe or self.adapter.probe_lr is not None:
                what = "--method linear-probe is" if probe else "--probe-lr trains"
                raise ValueError(f"{what} a classifier: it cannot be trained with --loss {self.loss.loss}")


@dataclass(frozen=True, kw_only=True)
class ClipModel(ModelOptions):
    """The chosen model."""

    model: str

    @property
    def title(self) -> str:
        """A short name, without the path of its folder."""
        return short_name(self.model).removesuffix(".json")


@dataclass(frozen=True, kw_only=True)
class ChosenLoss(LossOptions):
    """The loss, which depends on the data."""

    loss: Loss


@dataclass(frozen=True, kw_only=True)
class ClipSettings(ClipOptions):
    """All options with the defaults filled in."""

    clip: ClipModel
    loss: ChosenLoss
    training: Training
