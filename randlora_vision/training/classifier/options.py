"""The options of train_classifier.py, as given and with the defaults filled in."""

from dataclasses import dataclass, field
from typing import Any, Literal

from randlora_vision.names import short_name
from randlora_vision.training.data.options import DataOptions
from randlora_vision.training.harness.options import (
    AdapterOptions,
    CheckpointOptions,
    HubOptions,
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
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    FRACTION,
    FREE,
    PART,
    RARE,
    Options,
    flag,
    named_values,
    needs,
)

_OWN = ("pretrained", "num_classes", "checkpoint_path", "in_chans", "drop_rate", "drop_path_rate")
"""Arguments of timm's models that have options, or that the data determine."""
Method = Literal["randlora", "lora", "vera", "full", "linear-probe"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class ModelOptions(Options):
    """The timm model."""

    model: str | None = None
    """A timm model: its name, hf-hub:ORG/REPO or local-dir:FOLDER. Default: the tiny digits ViT, or
    vit_base_patch16_224 with pretrained weights if data is given."""
    pretrained: bool = False
    """Start from the pretrained weights of timm instead of random weights or --initial-checkpoint."""
    initial_checkpoint: str | None = None
    """Start from the weights in this file, a checkpoint or an .npz of the original ViT; timm adapts those of another
    image size, or with the names of the original authors."""
    fresh_head: bool = field(default=False, metadata=RARE)
    """Start with a new classifier head even if the weights contain one with the right number of classes; needed for
    an --initial-checkpoint with another number of classes."""
    img_size: int | None = field(default=None, metadata=AT_LEAST_1)
    """Image size in pixels (one side). Default: that of the model."""
    crop_pct: float | None = field(default=None, metadata=RARE | PART)
    """For evaluation, images are resized to --img-size divided by this, and their centre is cropped. Default: that of
    the model, as for the next three."""
    mean: tuple[float, ...] = field(default=(), metadata=RARE)
    """The mean of pixel values (from 0 to 1) that is subtracted: three numbers, or one for all colours."""
    std: tuple[float, ...] = field(default=(), metadata=RARE)
    """The standard deviation of pixel values, by which they are divided."""
    interpolation: Interpolation | None = field(default=None, metadata=RARE)
    """How images are resized, for training and evaluation."""
    num_classes: int | None = field(default=None, metadata=RARE | AT_LEAST_1)
    """Number of classes. Default: that of the data, so it can always be left out."""
    drop: float = field(default=0.0, metadata=RARE | BELOW_1)
    """Dropout rate before the classifier (timm's drop_rate)."""
    drop_path: float = field(default=0.0, metadata=RARE | BELOW_1)
    """Rate of stochastic depth, for models that have it."""
    model_kwargs: tuple[str, ...] = field(default=(), metadata=RARE)
    """More arguments of the model in timm, such as patch_size=12 act_layer=silu."""
    cache_dir: str | None = field(default=None, metadata=RARE)
    """Folder that caches the digits ViT. Default: $RANDLORA_CACHE, or randlora_vision in the user's cache."""

    @property
    def arguments(self) -> dict[str, Any]:
        """--model-kwargs by name; what is not a Python literal is a string. Raises ValueError for other words."""
        return named_values("--model-kwargs", self.model_kwargs, _OWN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arguments and self.model is None:
            raise ValueError("--model-kwargs needs --model")
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("--pretrained and --initial-checkpoint both choose the weights: give only one")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, 1, 3) or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"--{name} must be one or three numbers from 0 to 1, got {' '.join(map(str, values))}")
        if 0 in self.std:
            raise ValueError("--std must be above 0")


@dataclass(frozen=True)
class AugmentOptions(Options):
    """Augmentation of training images by timm. The embedded digits use small rotations by default."""

    no_aug: bool = False
    """No augmentation: training images are resized, and their centre is cropped."""
    auto_augment: str | None = None
    """A timm augmentation string, such as rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 or original."""
    scale: tuple[float, float] = field(default=(0.08, 1.0), metadata=RARE)
    """Smallest and largest part of the image's area in a random crop."""
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata=RARE)
    """Smallest and largest aspect ratio of a random crop."""
    hflip: float = field(default=0.5, metadata=RARE | FRACTION)
    """Probability of a horizontal flip."""
    vflip: float = field(default=0.0, metadata=RARE | FRACTION)
    """Probability of a vertical flip."""
    color_jitter: float = field(default=0.4, metadata=RARE | AT_LEAST_0)
    """Strength of random changes of brightness, contrast and saturation, without --auto-augment."""
    train_interpolation: Literal["random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = (
        field(default=None, metadata=RARE)
    )
    """How random crops are resized; random: bilinear or bicubic. Default: --interpolation."""
    aug_repeats: int = field(default=0, metadata=RARE | AT_LEAST_0)
    """How often an image comes in a row, augmented anew each time; an epoch has as many fewer of them."""
    aug_splits: int = field(default=0, metadata=RARE)
    """Train on every image and on this number, less one, of augmented copies of it (by --auto-augment or
    --color-jitter, after the same crop)."""
    jsd_loss: bool = field(default=False, metadata=RARE | needs("aug_splits"))
    """With --aug-splits: minimise the cross entropy of the images, and the Jensen-Shannon divergence between the
    predictions for them and their augmented copies (AugMix)."""
    resplit: bool = field(default=False, metadata=RARE | needs("aug_splits"))
    """With --aug-splits: erase rectangles of the augmented copies alone."""
    random_erasing: float = field(default=0.0, metadata=BELOW_1)
    """Probability of erasing a rectangle of an image."""
    erasing_mode: Literal["const", "rand", "pixel"] = field(default="const", metadata=RARE)
    """Erase with black, a random colour, or random pixels."""
    erasing_count: int = field(default=1, metadata=RARE | AT_LEAST_1)
    """Rectangles that are erased at most."""
    bce_target_thresh: float | None = field(default=None, metadata=RARE | needs("bce_loss"))
    """With --bce-loss: targets above this are 1, the others 0, also those of Mixup and CutMix."""
    bce_loss: bool = field(default=False, metadata=RARE)
    """Minimise the binary cross entropy of every class instead of the cross entropy over all classes."""
    label_smoothing: float = field(default=0.0, metadata=BELOW_1)
    """Fraction of the target that is spread over all classes."""
    mixup: float = field(default=0.0, metadata=AT_LEAST_0)
    """Alpha of Mixup; 0 disables it."""
    cutmix: float = field(default=0.0, metadata=AT_LEAST_0)
    """Alpha of CutMix; 0 disables it. If both are enabled, each batch uses one or the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_aug and (self.auto_augment or self.random_erasing):
            raise ValueError("--no-aug excludes --auto-augment and --random-erasing")
        if self.aug_splits == 1 or self.aug_splits < 0:
            raise ValueError(f"--aug-splits must be 0, or 2 or more, got {self.aug_splits}")
        for name in ("mixup", "cutmix", "no_aug", *(("bce_loss",) if self.jsd_loss else ())):
            if self.aug_splits and getattr(self, name):
                raise ValueError(
                    f"{flag(name)} cannot be combined with {'--jsd-loss' * self.jsd_loss or '--aug-splits'}"
                )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"--{name} must be two numbers above 0 in ascending order, got {low} {high}")


@dataclass(frozen=True)
class ClassifierAdapterOptions(AdapterOptions):
    """What is trained, in addition to the classifier head, which is always trained."""

    method: Method = "randlora"
    """RandLoRA, the LoRA or VeRA of PEFT on the same weights, full fine-tuning, or the head alone."""
    head_lr: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Peak learning rate of the head. Default: --lr; if that is not given either, the embedded digits use a separate
    default for RandLoRA."""


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
    hub: HubOptions = field(default_factory=HubOptions, metadata=FREE)

    def __post_init__(self) -> None:
        if (self.augment.mixup or self.augment.cutmix) and self.training.batch_size % 2:
            raise ValueError(f"--mixup and --cutmix need an even --batch-size, got {self.training.batch_size}")
        if self.adapter.alpha is not None and self.adapter.method == "vera":
            raise ValueError("--alpha: VeRA has no alpha, leave it out")
        require_epoch(self.data.streaming, self.training)
        if self.data.streaming and self.augment.aug_repeats > 1:
            raise ValueError("--aug-repeats: streamed images come once, leave it or --streaming out")
        model = self.model
        if model.model is None and (model.drop or model.drop_path):
            raise ValueError("--drop and --drop-path need --model")
        if model.model is None and (model.pretrained or model.initial_checkpoint or model.img_size):
            raise ValueError("--pretrained, --initial-checkpoint and --img-size need --model")

        require_digits_cache(model.cache_dir, model.model)

    @property
    def embedded(self) -> bool:
        """Whether the data is the embedded digits."""
        return self.data.embedded


@dataclass(frozen=True, kw_only=True)
class ClassifierModel(ModelOptions):
    """The chosen model."""

    model: str

    @property
    def title(self) -> str:
        """A short name, without the path of its folder."""
        return short_name(self.model)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(ClassifierOptions):
    """All options with the defaults filled in."""

    model: ClassifierModel
    training: Training
