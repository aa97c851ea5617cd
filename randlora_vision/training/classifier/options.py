"""The options of train_classifier.py, and what the ones left out become."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from randlora_vision.training.data.options import SplitOptions
from randlora_vision.training.harness.options import (
    AdapterOptions,
    CheckpointOptions,
    RateOptions,
    RunOptions,
    SpeedOptions,
    TrainingOptions,
)

Method = Literal["randlora", "lora", "vera", "full", "linear-probe"]
# The demo's have the lowest validation loss of one seed on a coarse grid. The others are the usual ones.
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
    """A model of timm: its name, hf-hub:ORG/REPO or local-dir:FOLDER. Left out: the tiny digits ViT, or
    vit_base_patch16_224 with pretrained weights where the data is given."""
    pretrained: bool = False
    """Start from timm's pretrained weights; otherwise from random ones, or from --initial-checkpoint."""
    initial_checkpoint: str | None = None
    """Start from the weights in this file."""
    fresh_head: bool = False
    """Start with a new classifier even where the weights bring one of the right number of classes; needed
    for an --initial-checkpoint of another number."""
    img_size: int | None = None
    """The side of the images in pixels. Left out: the model's own."""
    num_classes: int | None = None
    """Left out, as it can always be: the number that the data has."""
    cache_dir: str | None = None
    """Where the digits ViT is kept. Left out: $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    def __post_init__(self) -> None:
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("--pretrained and --initial-checkpoint both choose the weights: give one")
        for name in ("img_size", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")


@dataclass(frozen=True)
class DataOptions(SplitOptions):
    """The images."""

    data: str | None = None
    """A folder of class folders, or of train/ and val/ or test/ with class folders in each; with --dataset,
    where that keeps its files. Left out, with no --dataset: the embedded digits, all ten, background and
    foreground swapped."""
    dataset: str | None = None
    """A dataset by timm's name: torch/cifar10 (torchvision's), hfds/ORG/NAME (Hugging Face's)."""
    dataset_download: bool = False
    """Allow --dataset to fetch what is not on the disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_download and not self.dataset:
            raise ValueError("--dataset-download needs --dataset")


@dataclass(frozen=True)
class AugmentOptions:
    """How training images are changed, by timm. On the embedded digits: small rotations, unless given."""

    auto_augment: str | None = None
    """timm's string for it, such as rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 or original."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle of an image."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes."""
    mixup: float = 0.0
    """Mixup's alpha; 0 switches it off."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 switches it off. With both, every batch takes one or the other."""

    def __post_init__(self) -> None:
        for name in ("random_erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and below 1")
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError("--mixup and --cutmix must be 0 or more")


@dataclass(frozen=True)
class ClassifierAdapterOptions(AdapterOptions):
    """What is trained, beside the classifier head, which always is."""

    method: Method = "randlora"  # type: ignore[assignment]  # one method more
    """RandLoRA, PEFT's LoRA or VeRA on the same weights, full fine-tuning, or the head alone."""
    head_lr: float | None = None
    """Peak learning rate of the head. Left out: --lr (where that is left out too, the embedded digits have
    one of their own)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_lr is not None and self.head_lr <= 0:
            raise ValueError(f"--head-lr must be above 0, got {self.head_lr}")


@dataclass(frozen=True)
class ClassifierOptions:
    """Everything that train_classifier.py can be told."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    adapter: ClassifierAdapterOptions = field(default_factory=ClassifierAdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    rates: RateOptions = field(default_factory=RateOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if (self.augment.mixup or self.augment.cutmix) and self.training.batch_size % 2:
            raise ValueError(f"--mixup and --cutmix need an even --batch-size, got {self.training.batch_size}")
        if self.adapter.alpha is not None and self.adapter.method == "vera":
            raise ValueError("--alpha: VeRA has none")

    @property
    def embedded(self) -> bool:
        """Whether the data are the embedded digits."""
        return self.data.data is None and self.data.dataset is None


def resolve(options: ClassifierOptions) -> ClassifierOptions:
    """Return `options` with a value for everything left out, but for LoRA's rank when a budget sets it."""
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
    """Return a short name of the model: without the folders that lead to it."""
    return Path(options.model.model or "").name
