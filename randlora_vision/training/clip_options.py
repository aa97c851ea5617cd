"""The options of train_clip.py, and what the ones left out become."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from randlora_vision.training import digits
from randlora_vision.training.options import AdapterOptions, CheckpointOptions, Method, RunOptions, TrainingOptions

Towers = Literal["vision", "text", "both"]

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
    """RandLoRA and full fine-tuning: train the scale of the logits too, and save it with the rest."""
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
class ImageOptions:
    """The images and the words for their classes."""

    data: str | None = None
    """A folder of class folders, or of train/ and val/ or test/ with class folders in each. Left out:
    the embedded digits, all ten, background and foreground swapped."""
    val_fraction: float = 0.2
    """Part of every class held out for validation where the folder has neither val/ nor test/."""
    split_seed: int = 0
    """Seed of that choice, apart from --seed so that seeds are compared on the same images."""
    strict_data: bool = False
    """Stop at an unreadable image. Otherwise it is skipped, counted and listed in skipped.txt."""
    templates: tuple[str, ...] = ()
    """Prompts, each with {} for the class name. Left out: 'a photo of a {}.' (five on the digits)."""
    prompts: Literal["average", "sample"] = "sample"
    """In training, of several templates: their averaged features, or one template drawn per class and
    step (cheaper when the text tower learns). Evaluation always averages."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be between 0 and 1, got {self.val_fraction}")
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"--templates: {template!r} has no {{}} for the class name")


@dataclass(frozen=True)
class ClipOptions:
    """Everything that train_clip.py can be told."""

    clip: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.adapter.target_modules and self.clip.towers != "both":
            raise ValueError("--towers and --target-modules both choose what is adapted: give one")
        if self.clip.train_logit_scale and self.adapter.method not in ("randlora", "full"):
            raise ValueError(f"--train-logit-scale: a file of --method {self.adapter.method} has no place for it")


def resolve(options: ClipOptions) -> ClipOptions:
    """Return `options` with a value for everything left out, but for LoRA's rank when a budget sets it."""
    embedded, method = options.images.data is None, options.adapter.method
    clip, images, adapter, training = options.clip, options.images, options.adapter, options.training
    if clip.model is None and not embedded:
        clip = replace(clip, model="ViT-B-32", pretrained=clip.pretrained or "laion2b_s34b_b79k")
    if clip.model is None and clip.pretrained:
        raise ValueError("--pretrained needs --model: the digits CLIP has its own weights")
    if not images.templates:
        images = replace(images, templates=digits.TEMPLATES if embedded else ("a photo of a {}.",))
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


def model_title(options: ClipOptions) -> str:
    """Return a short name of the model: without the folders that lead to it."""
    return Path(options.clip.model or "").name.removesuffix(".json")
