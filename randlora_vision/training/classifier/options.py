"""The options of train_classifier.py and their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from randlora_vision.training.data.options import DataOptions
from randlora_vision.training.harness.options import (
    FREE,
    AdapterOptions,
    CheckpointOptions,
    RateOptions,
    RunOptions,
    SpeedOptions,
    TrainingOptions,
)

Method = Literal["randlora", "lora", "vera", "full", "linear-probe"]
# The rates of the demo have the lowest validation loss (one seed) on a coarse grid. The others are the usual ones.
_DEMO_LR: Mapping[Method, float] = {"randlora": 2e-3, "lora": 6e-3, "vera": 3e-2, "full": 1.2e-3, "linear-probe": 5e-2}
_DEMO_HEAD_LR: Mapping[Method, float] = {"randlora": 6e-3}
_LR: Mapping[Method, float] = {"randlora": 1e-3, "lora": 1e-3, "vera": 4e-3, "full": 1e-5, "linear-probe": 1e-3}
_DEMO_RANK: Mapping[Method, int] = {"randlora": 16, "lora": 2, "vera": 64}
_RANK: Mapping[Method, int] = {"randlora": 32, "lora": 8, "vera": 256}
_ALPHA_PER_RANK: Mapping[Method, float] = {"randlora": 20.0, "lora": 2.0}


@dataclass(frozen=True)
class ModelOptions:
    """The timm model."""

    model: str | None = None
    """A timm model: its name, hf-hub:ORG/REPO or local-dir:FOLDER. By default, the tiny digits ViT, or
    vit_base_patch16_224 with pretrained weights if data is given."""
    pretrained: bool = False
    """Start from the pretrained weights of timm instead of random weights or --initial-checkpoint."""
    initial_checkpoint: str | None = None
    """Start from the weights in this file."""
    fresh_head: bool = False
    """Start with a new classifier head even if the weights contain one with the right number of classes; needed for
    an --initial-checkpoint with another number of classes."""
    img_size: int | None = None
    """Image size in pixels (one side). Defaults to that of the model."""
    num_classes: int | None = None
    """Number of classes. Defaults to that of the data, so it can always be left out."""
    cache_dir: str | None = None
    """Folder that caches the digits ViT. Defaults to $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    def __post_init__(self) -> None:
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("--pretrained and --initial-checkpoint both choose the weights: give one")
        for name in ("img_size", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation of training images by timm. The embedded digits use small rotations by default."""

    auto_augment: str | None = None
    """A timm augmentation string, such as rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 or original."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle of an image."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of Mixup; 0 disables it."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 disables it. If both are enabled, each batch uses one or the other."""

    def __post_init__(self) -> None:
        for name in ("random_erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and below 1")
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError("--mixup and --cutmix must be 0 or more")


@dataclass(frozen=True)
class ClassifierAdapterOptions(AdapterOptions):
    """What is trained, in addition to the classifier head, which is always trained."""

    method: Method = "randlora"  # type: ignore[assignment]  # one more method
    """RandLoRA, the LoRA or VeRA of PEFT on the same weights, full fine-tuning, or the head alone."""
    head_lr: float | None = None
    """Peak learning rate of the head. Defaults to --lr; if that is not given either, the embedded digits use a
    separate default for RandLoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_lr is not None and self.head_lr <= 0:
            raise ValueError(f"--head-lr must be above 0, got {self.head_lr}")


@dataclass(frozen=True)
class ClassifierOptions:
    """All options of train_classifier.py."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    adapter: ClassifierAdapterOptions = field(default_factory=ClassifierAdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions, metadata=FREE)
    run: RunOptions = field(default_factory=RunOptions, metadata=FREE)

    def __post_init__(self) -> None:
        if (self.augment.mixup or self.augment.cutmix) and self.training.batch_size % 2:
            raise ValueError(f"--mixup and --cutmix need an even --batch-size, got {self.training.batch_size}")
        if self.adapter.alpha is not None and self.adapter.method == "vera":
            raise ValueError("--alpha: VeRA has no alpha, leave it out")

    @property
    def embedded(self) -> bool:
        """Whether the data is the embedded digits."""
        return self.data.embedded


def resolve(options: ClassifierOptions) -> ClassifierOptions:
    """Return `options` with the defaults filled in, except the rank of LoRA if a budget sets it."""
    embedded, method = options.embedded, options.adapter.method
    model, adapter, training = options.model, options.adapter, options.training
    if model.model is None:
        given = model.pretrained or model.initial_checkpoint or model.img_size
        if given:
            raise ValueError("--pretrained, --initial-checkpoint and --img-size need --model")
        model = model if embedded else replace(model, model="vit_base_patch16_224", pretrained=True)
    if adapter.rank is None and adapter.budget is None and method in _RANK:
        adapter = replace(adapter, rank=(_DEMO_RANK if embedded else _RANK)[method])
    if adapter.alpha is None and adapter.rank is not None and method in _ALPHA_PER_RANK:
        adapter = replace(adapter, alpha=_ALPHA_PER_RANK[method] * adapter.rank)
    if embedded and training.lr is None and adapter.head_lr is None:
        adapter = replace(adapter, head_lr=_DEMO_HEAD_LR.get(method))
    lr = training.lr or (_DEMO_LR if embedded else _LR)[method]
    steps = training.steps or (300 if embedded else 1000)
    return replace(options, model=model, adapter=adapter, training=replace(training, lr=lr, steps=steps))


def model_title(options: ClassifierOptions) -> str:
    """Return a short name of the model, without the path of its folder."""
    return Path(options.model.model or "").name
