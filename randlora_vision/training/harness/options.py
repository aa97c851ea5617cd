"""The options that every training script shares.

Each group is a frozen dataclass, validated on construction; its field docstrings are the help texts.
A script nests the groups that it needs in its own dataclass and calls `parse`. The first line of a group is its title
in the help.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from randlora_vision.training.harness.command_line import parse as parse
from randlora_vision.training.harness.optim import PRODIGY, check_optimizer_name
from randlora_vision.training.harness.schedules import Schedule, ScheduleOptions, warmup_steps
from randlora_vision.training.harness.stopping import seconds_of
from randlora_vision.training.option_fields import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    FREE,
    PART,
    RARE,
    Options,
    flag,
    named_values,
    needs,
)

Method = Literal["randlora", "lora", "dora", "vera", "nola", "full", "linear-probe"]  # each script has a subset


@dataclass(frozen=True)
class AdapterOptions(Options):
    """The training method and its adapter."""

    method: Method = "randlora"
    """How the model is trained."""
    rank: int | None = field(default=None, metadata=AT_LEAST_1)
    """RandLoRA: the rank of one random base: a LARGER rank means FEWER trained numbers, the opposite of LoRA. NoLA: the
    number of random matrices in a bank."""
    alpha: float | None = field(default=None, metadata=ABOVE_0)
    """Numerator of the scale alpha / rank."""
    budget: int | None = field(default=None, metadata=RARE | AT_LEAST_1)
    """LoRA, DoRA, VeRA and NoLA: choose the rank whose number of trained parameters is closest to this, instead of
    --rank."""
    dropout: float = field(default=0.0, metadata=RARE | BELOW_1)
    """RandLoRA: dropout on the adapter's input."""
    bases: Literal["uniform", "normal", "sparse", "very_sparse", "structured"] = field(
        default="structured", metadata=RARE
    )
    """RandLoRA: the kind of the random bases. Structured ones train at about the cost of LoRA; PEFT can load an export
    of the others, of which uniform ones are the paper's."""
    init: Literal["lambda-zero", "gamma-zero"] = field(default="lambda-zero", metadata=RARE)
    """RandLoRA: which factor starts at zero: lambda, as in PEFT, or gamma, as in the paper's vision code."""
    target_modules: tuple[str, ...] = field(default=(), metadata=RARE)
    """Which weights are adapted: one preset or regular expression, or several name suffixes.
    Default: the attention and MLP weights of the chosen towers."""
    exclude_modules: tuple[str, ...] = field(default=(), metadata=RARE)
    """Names of weights, or of modules that contain them, that are never adapted."""
    init_adapter: str | None = field(default=None, metadata=RARE)
    """Start from the values in this file, which the same script wrote with the same method, rank, alpha, bases, seed
    and targets. A resumed run does not read it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.method not in ("lora", "dora", "vera", "nola"):
            raise ValueError(f"--budget chooses the rank of --method lora, not of --method {self.method}")
        if self.budget is not None and self.rank is not None:
            raise ValueError("--budget and --rank both choose the rank: give only one")
        if self.exclude_modules and self.method in ("full", "linear-probe"):
            raise ValueError(f"--exclude-modules: --method {self.method} adapts no weights, leave it out")
        if self.dropout and self.method != "randlora":
            raise ValueError(f"--dropout needs --method randlora; --method {self.method} has no dropout")


@dataclass(frozen=True)
class LoopOptions(Options):
    """The optimiser, the batches and the evaluations."""

    steps: int | None = field(default=None, metadata=FREE | AT_LEAST_1)
    """Optimiser steps."""
    epochs: float | None = field(default=None, metadata=FREE | ABOVE_0)
    """Passes over the training images, instead of --steps. The steps are rounded up."""
    epoch_images: int | None = field(default=None, metadata=RARE | ABOVE_0)
    """Images that make up an epoch. Default: all training images."""
    batch_size: int = field(default=64, metadata=AT_LEAST_1)
    """Images per forward pass and process; an optimiser step uses this number times the accumulation steps
    times the number of processes."""
    gradient_accumulation_steps: int = field(default=1, metadata=AT_LEAST_1)
    """Forward passes whose gradients are averaged into one optimiser step."""
    optimizer: str = "adamw"
    """A timm optimiser (see timm.optim.list_optimizers()). It may have the prefix lookahead_. Or prodigy, which finds
    the rate itself (pip install prodigyopt), with --lr 1."""
    lr: float | Literal["auto"] | None = field(default=None, metadata=ABOVE_0)
    """Peak learning rate. The defaults are for AdamW. auto, the default of RandLoRA on your own model or data, is the
    rate at which one step changes the features of images by 12% of their spread (docs/learning-rate.md)."""
    optimizer_kwargs: tuple[str, ...] = field(default=(), metadata=RARE)
    """More arguments of the optimiser, such as nesterov=True momentum=0.8."""
    lr_images: int | None = field(default=None, metadata=RARE | AT_LEAST_1)
    """--lr is for optimiser steps of this many images, and is scaled to those of this run."""
    lr_scaling: Literal["linear", "sqrt"] | None = field(default=None, metadata=RARE | needs("lr_images"))
    """With --lr-images: how the rate depends on the images of a step. Default: sqrt for the Adam family and LAMB, else
    linear, as in timm."""
    weight_decay: float = field(default=0.01, metadata=AT_LEAST_0)
    """Weight decay of matrices and convolutions, including lambda and gamma. Vectors and scalars are never decayed."""
    beta1: float | None = field(default=None, metadata=RARE | BELOW_1)
    """First beta of an optimiser of the Adam family. Default: that of the optimiser."""
    beta2: float | None = field(default=None, metadata=RARE | BELOW_1)
    """Second beta of an optimiser of the Adam family. Default: that of the optimiser."""
    eps: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Epsilon of the optimiser. Default: that of the optimiser."""
    ema_decay: float = field(default=0.0, metadata=RARE | BELOW_1)
    """Decay of a moving average of the trained parameters, which is evaluated and saved in their place (0: off).
    The decay is at most (1 + t) / (10 + t) at step t, so it is smaller in the first steps."""
    max_grad_norm: float = field(default=1.0, metadata=RARE | AT_LEAST_0)
    """Clip the gradient to this norm; 0 disables clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward passes; trained parameters stay in float32."""
    seed: int = field(default=0, metadata=AT_LEAST_0)
    """Seed of the bases, the order of the images, augmentation and dropout."""
    eval_every: int = field(default=25, metadata=AT_LEAST_1)
    """Steps between evaluations on the validation split; there is always one before the first step and one
    after the last."""
    eval_epochs: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Epochs between evaluations, instead of --eval-every."""
    best_metric: str = field(default="top1", metadata=RARE)
    """The validation metric by which the best state is chosen."""
    early_stopping_patience: int = field(default=0, metadata=RARE | AT_LEAST_0)
    """Stop after this many evaluations without an improvement of --best-metric; 0: never."""
    log_every: int = field(default=5, metadata=FREE | RARE | AT_LEAST_1)
    """Steps between lines of training values in metrics.jsonl."""
    workers: int | None = field(default=None, metadata=FREE | RARE | AT_LEAST_0)
    """Worker processes that load images (0: the training process loads them itself). Default: 4, or fewer if
    there are not enough free cores; 0 for the embedded digits, which are already decoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optimizer_name(self.optimizer)
        _ = self.optimizer_arguments  # raises for a wrong one
        if self.lr_images is not None and self.lr in (None, "auto"):
            raise ValueError("--lr-images (--scale-lr, --lr-base-size) needs a number for --lr")
        if self.optimizer == PRODIGY:
            if self.lr == "auto":
                raise ValueError("--lr auto is for AdamW: leave it out, --optimizer prodigy finds the rate itself")
            object.__setattr__(self, "lr", self.lr or 1.0)

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """--optimizer-kwargs by name. Raises ValueError for other words."""
        return named_values("--optimizer-kwargs", self.optimizer_kwargs, ("lr", "weight_decay", "betas", "eps"))


@dataclass(frozen=True)
class TrainingOptions(ScheduleOptions, LoopOptions):
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_lr", "warmup_lr"):
            value = getattr(self, name)
            if isinstance(self.lr, float | int) and self.lr_images is None and (value or 0) > self.lr:
                raise ValueError(f"{flag(name)} must be at most --lr {self.lr}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Training(TrainingOptions):
    """`TrainingOptions` with the defaults filled in."""

    steps: int = field(metadata=FREE)
    lr: float

    def batches(self, processes: int) -> int:
        """Return how many batches all processes together take from the loader."""
        return self.steps * self.gradient_accumulation_steps * processes

    def scaled_lr(self, images: int) -> float:
        """Return the learning rate for optimiser steps of so many images."""
        if self.lr_images is None:
            return self.lr
        usual = "sqrt" if any(part in self.optimizer for part in ("ada", "lamb")) else "linear"
        return self.lr * (images / self.lr_images) ** (0.5 if (self.lr_scaling or usual) == "sqrt" else 1)

    @property
    def warmup(self) -> int:
        """The number of steps over which the learning rate warms up."""
        return warmup_steps(self, self.steps)

    @property
    def rates(self) -> Schedule:
        """The factor on the learning rates over the steps."""
        return Schedule(
            self.steps,
            self.warmup,
            self.schedule,
            floor=self.min_lr / self.lr,
            start=(self.warmup_lr or 0) / self.lr,
            power=self.lr_power,
            cycles=self.lr_num_cycles,
            cycle_mul=self.lr_cycle_mul,
            cycle_decay=self.lr_cycle_decay,
            times=self.decay_steps,
            rate=self.decay_rate,
            noise=self.lr_noise,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RateOptions(Options):
    """Layer-wise learning rates."""

    layer_decay: float = field(default=1.0, metadata=RARE | PART)
    """Each layer's learning rate is this times that of the next layer; the head or projection at the end uses
    --lr (timm's rule, applied to each tower of a CLIP model separately). 1: the same rate everywhere."""


@dataclass(frozen=True)
class SpeedOptions(Options):
    """Speed and memory use."""

    gradient_checkpointing: bool = False
    """Keep fewer activations for the backward pass and recompute the others: less memory, more time."""
    torch_compile: bool = field(default=False, metadata=RARE)
    """Compile the forward and backward passes with torch.compile."""
    channels_last: bool = field(default=False, metadata=RARE)
    """Keep convolution weights and images in the channels-last format, which is faster on tensor cores."""


@dataclass(frozen=True)
class RunOptions(Options):
    """Where the results go."""

    output_dir: str | None = None
    """The run folder. Default: <--runs-dir>/<--run-name>."""
    runs_dir: str = field(default="runs", metadata=RARE)
    """The folder of the run folder, without --output-dir."""
    run_name: str | None = field(default=None, metadata=RARE)
    """The name of the run folder, without --output-dir. Default: <script>-<date and time>."""
    overwrite: bool = field(default=False, metadata=RARE)
    """Replace a run that the folder already holds (only files written by a run); otherwise that is an error."""
    report_to: tuple[str, ...] = ()
    """Trackers that also receive metrics and pictures: tensorboard (in the run folder's logs/), wandb, mlflow
    and others that accelerate supports, or none. Default: tensorboard, if it is installed."""
    tracker_project: str | None = field(default=None, metadata=RARE)
    """The project under which trackers such as wandb list the run. Default: $WANDB_PROJECT, or randlora_vision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = tuple(name for group in self.report_to for name in group.split(",") if name)
        object.__setattr__(self, "report_to", names)
        if names:
            from randlora_vision.training.harness.trackers import chosen_trackers

            chosen_trackers(names)


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """Checkpoints, and resuming from them."""

    checkpoint_every: int = field(default=0, metadata=AT_LEAST_0)
    """Steps between checkpoints, written to the run folder's checkpoints/; 0: none."""
    checkpoints_total_limit: int = field(default=2, metadata=RARE | AT_LEAST_1)
    """How many checkpoints are kept; an older one is removed once a newer one is safely on disk."""
    resume: str | None = None
    """Resume from the path of a checkpoint, or from the latest of --output-dir, or start if it has none: latest.
    The result is exactly that of an uninterrupted run. A setting that may not change is refused, with a list of those
    that may, such as --steps."""
    time_limit: str | None = None
    """Stop before this time is over, with a checkpoint and exit code 124: minutes, H:M:S or D-H:M:S."""
    checkpoint_epochs: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Epochs between checkpoints, instead of --checkpoint-every."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_limit is not None:
            seconds_of(self.time_limit)


@dataclass(frozen=True)
class HubOptions(Options):
    """The Hugging Face Hub."""

    push_to_hub: bool = field(default=False, metadata=RARE)
    """Upload the adapter with its card, metrics and pictures after training; requires a login (HF_TOKEN, or hf auth
    login)."""
    hub_model_id: str | None = field(default=None, metadata=RARE | needs("push_to_hub"))
    """The repository to upload to: OWNER/NAME, or NAME for your own. Default: the name of the run folder."""


def require_digits_cache(cache_dir: str | None, model: str | None) -> None:
    """Raise ValueError when a cache is given with a model that is downloaded: other scripts cache it there."""
    if cache_dir and model:
        raise ValueError("--cache-dir is for the digits only: set the environment variable HF_HOME for downloads")


def require_epoch(streaming: bool, training: TrainingOptions) -> None:
    """Raise ValueError when images are streamed without a number of images that make up an epoch."""
    if streaming and training.epoch_images is None:
        raise ValueError("--streaming counts no images: give --train-num-samples (--epoch-images), those of an epoch")
