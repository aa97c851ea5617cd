"""The options that every training script shares.

Each group is a frozen dataclass, validated on construction; its field docstrings are the help texts.
A script nests the groups that it needs in its own dataclass and calls `parse`. The first line of a group is its title
in the help.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from randlora_vision.training.harness.command_line import parse as parse
from randlora_vision.training.harness.optim import Schedule, check_optimizer_name
from randlora_vision.training.harness.stopping import seconds_of

Method = Literal["randlora", "lora", "dora", "vera", "nola", "full", "linear-probe"]  # each script has a subset
FREE = {"free": True}
"""Metadata of settings, or groups of settings, that may differ on resuming."""


@dataclass(frozen=True)
class AdapterOptions:
    """The training method and its adapter."""

    method: Method = "randlora"
    """How the model is trained."""
    rank: int | None = None
    """RandLoRA: the rank of one random base: a LARGER rank means FEWER trained numbers, the opposite of LoRA. NoLA: the
    number of random matrices in a bank."""
    alpha: float | None = None
    """Numerator of the scale alpha / rank."""
    budget: int | None = None
    """LoRA, DoRA, VeRA and NoLA: choose the rank whose number of trained parameters is closest to this, instead of
    --rank."""
    dropout: float = 0.0
    """RandLoRA: dropout on the adapter's input."""
    bases: Literal["uniform", "normal", "sparse", "very_sparse", "structured"] = "uniform"
    """RandLoRA: the distribution of the random bases. Structured bases train at about the cost of LoRA."""
    init: Literal["lambda-zero", "gamma-zero"] = "lambda-zero"
    """RandLoRA: which factor starts at zero: lambda, as in PEFT, or gamma, as in the paper's vision code."""
    target_modules: tuple[str, ...] = ()
    """Which weights are adapted: one preset or regular expression, or several name suffixes.
    Default: the attention and MLP weights of the chosen towers."""
    exclude_modules: tuple[str, ...] = ()
    """Names of weights, or of modules that contain them, that are never adapted."""
    init_adapter: str | None = None
    """Start from the values in this file, which the same script wrote with the same method, rank, alpha, bases, seed
    and targets. A resumed run does not read it again."""

    def __post_init__(self) -> None:
        _require(self.rank is None or self.rank >= 1, "--rank must be 1 or more", self.rank)
        _require(self.alpha is None or self.alpha > 0, "--alpha must be above 0", self.alpha)
        _require(self.budget is None or self.budget >= 1, "--budget must be 1 or more", self.budget)
        _require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1", self.dropout)
        if self.budget is not None and self.method not in ("lora", "dora", "vera", "nola"):
            raise ValueError(f"--budget chooses the rank of --method lora, not of --method {self.method}")
        if self.budget is not None and self.rank is not None:
            raise ValueError("--budget and --rank both choose the rank: give only one")
        if self.exclude_modules and self.method in ("full", "linear-probe"):
            raise ValueError(f"--exclude-modules: --method {self.method} adapts no weights, leave it out")
        if self.dropout and self.method != "randlora":
            raise ValueError(f"--dropout needs --method randlora; --method {self.method} has no dropout")


_WARMUP_FRACTION = 0.1


@dataclass(frozen=True)
class TrainingOptions:
    """The training loop."""

    steps: int | None = field(default=None, metadata=FREE)
    """Optimiser steps."""
    epochs: float | None = field(default=None, metadata=FREE)
    """Passes over the training images, instead of --steps. The steps are rounded up."""
    epoch_images: int | None = None
    """Images that make up an epoch. Default: all training images."""
    batch_size: int = 64
    """Images per forward pass and process; an optimiser step uses this number times the accumulation steps
    times the number of processes."""
    gradient_accumulation_steps: int = 1
    """Forward passes whose gradients are averaged into one optimiser step."""
    optimizer: str = "adamw"
    """A timm optimiser (see timm.optim.list_optimizers()), optionally with the prefix lookahead_."""
    lr: float | Literal["auto"] | None = None
    """Peak learning rate. The defaults are for AdamW. auto, the default of RandLoRA on your own model or data, is the
    rate at which one step changes an adapted weight by 2% of its norm (docs/learning-rate.md)."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule. Other peak rates end at the same fraction of their peak."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions, including lambda and gamma. Vectors and scalars are never decayed."""
    beta1: float | None = None
    """First beta of an optimiser of the Adam family. Default: that of the optimiser."""
    beta2: float | None = None
    """Second beta of an optimiser of the Adam family. Default: that of the optimiser."""
    eps: float | None = None
    """Epsilon of the optimiser. Default: that of the optimiser."""
    warmup_fraction: float | None = None
    """Fraction of the steps over which the learning rate warms up linearly. Default: 0.1."""
    warmup_steps: int | None = None
    """Steps over which it warms up, instead of a fraction."""
    warmup_epochs: float | None = None
    """Epochs over which it warms up, instead of a fraction."""
    schedule: Schedule = "cosine"
    """The learning rate after the warmup: falling to zero along a half cosine or a line, or constant."""
    ema_decay: float = 0.0
    """Decay of a moving average of the trained parameters, which is evaluated and saved in their place (0: off).
    The decay is at most (1 + t) / (10 + t) at step t, so it is smaller in the first steps."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 disables clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward passes; trained parameters stay in float32."""
    seed: int = 0
    """Seed of the bases, the order of the images, augmentation and dropout."""
    eval_every: int = 25
    """Steps between evaluations on the validation split; there is always one before the first step and one
    after the last."""
    eval_epochs: float | None = None
    """Epochs between evaluations, instead of --eval-every."""
    best_metric: str = "top1"
    """The validation metric by which the best state is chosen."""
    early_stopping_patience: int = 0
    """Stop after this many evaluations without an improvement of --best-metric; 0: never."""
    log_every: int = field(default=5, metadata=FREE)
    """Steps between lines of training values in metrics.jsonl."""
    workers: int | None = field(default=None, metadata=FREE)
    """Worker processes that load images (0: the training process loads them itself). Default: 4, or fewer if
    there are not enough free cores; 0 for the embedded digits, which are already decoded."""

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 1, "--steps must be 1 or more", self.steps)
        lr = None if self.lr == "auto" else self.lr
        _require(lr is None or lr > 0, "--lr must be above 0", lr)
        for name in ("batch_size", "gradient_accumulation_steps", "eval_every", "log_every"):
            _require(getattr(self, name) >= 1, f"{_flag(name)} must be 1 or more", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm", "seed", "early_stopping_patience"):
            _require(getattr(self, name) >= 0, f"{_flag(name)} must be 0 or more", getattr(self, name))
        _require(self.workers is None or self.workers >= 0, "--workers must be 0 or more", self.workers)
        for name in ("epochs", "epoch_images", "eval_epochs"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{_flag(name)} must be above 0", value)
        for name in ("warmup_steps", "warmup_epochs"):
            _require((getattr(self, name) or 0) >= 0, f"{_flag(name)} must be 0 or more", getattr(self, name))
        for name in ("warmup_fraction", "beta1", "beta2"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"{_flag(name)} must be at least 0 and below 1", value)
        _require(self.eps is None or self.eps > 0, "--eps must be above 0", self.eps)
        _require(self.min_lr >= 0, "--min-lr must be 0 or more", self.min_lr)
        _require(lr is None or self.min_lr <= lr, f"--min-lr must be at most --lr {lr}", self.min_lr)
        _require(0 <= self.ema_decay < 1, "--ema-decay must be at least 0 and below 1", self.ema_decay)
        check_optimizer_name(self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Training(TrainingOptions):
    """`TrainingOptions` with the defaults filled in."""

    steps: int = field(metadata=FREE)
    lr: float

    def batches(self, processes: int) -> int:
        """Return how many batches all processes together take from the loader."""
        return self.steps * self.gradient_accumulation_steps * processes

    @property
    def warmup(self) -> int:
        """The number of steps over which the learning rate warms up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((_WARMUP_FRACTION if self.warmup_fraction is None else self.warmup_fraction) * self.steps)


@dataclass(frozen=True)
class RateOptions:
    """Layer-wise learning rates."""

    layer_decay: float = 1.0
    """Each layer's learning rate is this times that of the next layer; the head or projection at the end uses
    --lr (timm's rule, applied to each tower of a CLIP model separately). 1: the same rate everywhere."""

    def __post_init__(self) -> None:
        _require(0 < self.layer_decay <= 1, "--layer-decay must be above 0 and at most 1", self.layer_decay)


@dataclass(frozen=True)
class SpeedOptions:
    """Speed and memory use."""

    gradient_checkpointing: bool = False
    """Keep fewer activations for the backward pass and recompute the others: less memory, more time."""
    torch_compile: bool = False
    """Compile the forward and backward passes with torch.compile."""
    channels_last: bool = False
    """Keep convolution weights and images in the channels-last format, which is faster on tensor cores."""


@dataclass(frozen=True)
class RunOptions:
    """Where the results go."""

    output_dir: str | None = None
    """The run folder. Default: <--runs-dir>/<--run-name>."""
    runs_dir: str = "runs"
    """The folder of the run folder, without --output-dir."""
    run_name: str | None = None
    """The name of the run folder, without --output-dir. Default: <script>-<date and time>."""
    overwrite: bool = False
    """Replace a run that the folder already holds (only files written by a run); otherwise that is an error."""
    report_to: tuple[str, ...] = ()
    """Trackers that also receive metrics and pictures: tensorboard (in the run folder's logs/), wandb, mlflow
    and others that accelerate supports, or none. Default: tensorboard, if it is installed."""

    def __post_init__(self) -> None:
        names = tuple(name for group in self.report_to for name in group.split(",") if name)
        object.__setattr__(self, "report_to", names)
        if names:
            from randlora_vision.training.harness.trackers import chosen_trackers

            chosen_trackers(names)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints, and resuming from them."""

    checkpoint_every: int = 0
    """Steps between checkpoints, written to the run folder's checkpoints/; 0: none."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept; an older one is removed once a newer one is safely on disk."""
    resume: str | None = None
    """Resume from 'latest' (of --output-dir; without a checkpoint, the run starts) or from the path of a checkpoint.
    The result is exactly that of an uninterrupted run. A setting that may not change is refused, with a list of those
    that may, such as --steps."""
    time_limit: str | None = None
    """Stop before this time is over, with a checkpoint and exit code 124: minutes, H:M:S or D-H:M:S."""
    checkpoint_epochs: float | None = None
    """Epochs between checkpoints, instead of --checkpoint-every."""

    def __post_init__(self) -> None:
        _require(self.checkpoint_every >= 0, "--checkpoint-every must be 0 or more", self.checkpoint_every)
        every = self.checkpoint_epochs
        _require(every is None or every > 0, "--checkpoint-epochs must be above 0", every)
        limit = self.checkpoints_total_limit
        _require(limit >= 1, "--checkpoints-total-limit must be 1 or more", limit)
        if self.time_limit is not None:
            seconds_of(self.time_limit)


@dataclass(frozen=True)
class HubOptions:
    """The Hugging Face Hub."""

    push_to_hub: bool = False
    """Upload the adapter with its card, metrics and pictures after training; requires a login (HF_TOKEN, or hf auth
    login)."""
    hub_model_id: str | None = None
    """The repository to upload to: OWNER/NAME, or NAME for your own. Default: the name of the run folder."""

    def __post_init__(self) -> None:
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("--hub-model-id needs --push-to-hub")


def without(options: Any, *names: str) -> dict[str, Any]:
    """Return the fields of `options` (a dataclass) except `names`, as the arguments of another dataclass."""
    return {name: value for name, value in vars(options).items() if name not in names}


def free_settings(options: Any) -> list[str]:
    """Return the settings, and whole groups of settings, marked as `FREE`: ``"run"``, ``"training.workers"``."""
    free = []
    for group in fields(options):
        members = () if "free" in group.metadata else fields(getattr(options, group.name))
        free += [f"{group.name}.{member.name}" for member in members if "free" in member.metadata]
        free += [group.name] if "free" in group.metadata else []
    return free


def require_digits_cache(cache_dir: str | None, model: str | None) -> None:
    """Raise ValueError when a cache is given with a model that is downloaded: other scripts cache it there."""
    if cache_dir and model:
        raise ValueError("--cache-dir is for the digits only: set the environment variable HF_HOME for downloads")


def require_epoch(streaming: bool, training: TrainingOptions) -> None:
    """Raise ValueError when images are streamed without a number of images that make up an epoch."""
    if streaming and training.epoch_images is None:
        raise ValueError("--streaming counts no images: give --train-num-samples (--epoch-images), those of an epoch")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{expected}, got {got}")
