"""The options that every training script shares, and how a command line becomes one object of them.

Each group is a frozen dataclass, checked when built; its field docstrings are the help texts.
A script nests the groups that it needs in a dataclass of its own and calls `parse`.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from randlora_vision.errors import one_line
from randlora_vision.training.harness.config_file import ConfigFile, expand_config
from randlora_vision.training.harness.optim import Schedule, check_optimizer_name

Method = Literal["randlora", "lora", "full", "linear-probe"]
_Options = TypeVar("_Options")


def also(*flags: str) -> Any:
    """Return the mark of an option that goes by other names too: those of diffusers' training scripts."""
    return tyro.conf.arg(aliases=flags)


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained."""

    method: Method = "randlora"
    """RandLoRA, LoRA on the same weights, full fine-tuning, or a linear classifier on frozen features."""
    rank: int | None = None
    """RandLoRA: the rank of one random base; a LARGER rank means FEWER trained numbers, the opposite of
    LoRA. Left out: 32 (16 on the embedded digits) for RandLoRA, 8 for LoRA."""
    alpha: Annotated[float | None, also("--lora-alpha")] = None
    """Numerator of the scale alpha / rank. Left out: 20 * rank for RandLoRA, 2 * rank for LoRA."""
    budget: int | None = None
    """LoRA, instead of --rank: the number of trained numbers to come nearest to."""
    dropout: Annotated[float, also("--lora-dropout")] = 0.0
    """RandLoRA: dropout on the adapter's input."""
    bases: Literal["uniform", "normal", "sparse", "very_sparse", "structured"] = "uniform"
    """RandLoRA: the distribution of the random bases. Structured ones train at about the cost of LoRA."""
    init: Literal["lambda-zero", "gamma-zero"] = "lambda-zero"
    """RandLoRA: which factor starts at zero (PEFT's choice, or the paper's vision code's)."""
    target_modules: tuple[str, ...] = ()
    """Which weights are adapted: one preset or regular expression, or several name suffixes.
    Left out: the attention and MLP weights of the chosen towers."""

    def __post_init__(self) -> None:
        _require(self.rank is None or self.rank >= 1, "--rank must be 1 or more", self.rank)
        _require(self.alpha is None or self.alpha > 0, "--alpha must be above 0", self.alpha)
        _require(self.budget is None or self.budget >= 1, "--budget must be 1 or more", self.budget)
        _require(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1", self.dropout)
        if self.budget is not None and self.method != "lora":
            raise ValueError(f"--budget chooses the rank of --method lora, not of --method {self.method}")
        if self.budget is not None and self.rank is not None:
            raise ValueError("--budget and --rank both choose LoRA's rank: give one")
        if self.dropout and self.method != "randlora":
            raise ValueError(f"--dropout is RandLoRA's; --method {self.method} has none")


@dataclass(frozen=True)
class TrainingOptions:
    """How it is trained."""

    steps: Annotated[int | None, also("--max-steps", "--max-train-steps")] = None
    """Optimiser steps. Left out: 1000 (fewer on the embedded digits; config.yaml tells)."""
    batch_size: Annotated[int, also("--train-batch-size")] = 64
    """Images in one forward call of one process; one optimiser step sees this times the accumulation
    steps times the processes."""
    gradient_accumulation_steps: int = 1
    """Forward calls whose gradients are averaged into one optimiser step."""
    optimizer: str = "adamw"
    """One of timm's optimisers by name (timm.optim.list_optimizers()), with lookahead_ before it if wanted."""
    lr: Annotated[float | None, also("--learning-rate")] = None
    """Peak learning rate. Left out: the method's own default, chosen for AdamW (in config.yaml after the run)."""
    weight_decay: Annotated[float, also("--adam-weight-decay")] = 0.01
    """Decay of matrices and convolutions, lambda and gamma among them; vectors and scalars (biases, norms'
    scales, class tokens, the logit scale) are never decayed."""
    warmup_fraction: float = 0.1
    """Part of the steps over which the learning rate rises."""
    schedule: Annotated[Schedule, also("--lr-scheduler")] = "cosine"
    """The learning rate's way after that: down to zero along a half cosine or a line, or constant."""
    ema_decay: float = 0.0
    """Measure and save, in place of the trained numbers, their moving average with this decay (0: off).
    The decay is smaller in the first steps, (1 + t) / (10 + t) at step t."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer; 0 switches that off."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward passes; trained numbers stay float32."""
    seed: int = 0
    """Seed of the bases, the order of the images, augmentation and dropout."""
    eval_every: Annotated[int, also("--validation-steps")] = 25
    """Steps between two evaluations on the validation split; there is always one before the first
    step and one after the last."""
    best_metric: str = "top1"
    """The value measured on the validation split by which the best state is chosen."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations without a better value than the best so far; 0: never."""
    log_every: int = 5
    """Steps between two lines of training values in metrics.jsonl."""
    workers: Annotated[int | None, also("--dataloader-num-workers")] = None
    """Processes that decode images ahead of the training process (0: it does so itself). Left out: 4, or as many
    as there are cores to spare; 0 for the embedded digits, which are decoded."""

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 1, "--steps must be 1 or more", self.steps)
        _require(self.lr is None or self.lr > 0, "--lr must be above 0", self.lr)
        for name in ("batch_size", "gradient_accumulation_steps", "eval_every", "log_every"):
            _require(getattr(self, name) >= 1, f"{_flag(name)} must be 1 or more", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm", "seed", "early_stopping_patience"):
            _require(getattr(self, name) >= 0, f"{_flag(name)} must be 0 or more", getattr(self, name))
        _require(self.workers is None or self.workers >= 0, "--workers must be 0 or more", self.workers)
        warmup = self.warmup_fraction
        _require(0 <= warmup < 1, "--warmup-fraction must be at least 0 and below 1", warmup)
        _require(0 <= self.ema_decay < 1, "--ema-decay must be at least 0 and below 1", self.ema_decay)
        check_optimizer_name(self.optimizer)


@dataclass(frozen=True)
class RateOptions:
    """Learning rates that differ from layer to layer."""

    layer_decay: float = 1.0
    """Every layer learns at this times the rate of the layer after it, the head or projection at the end at
    --lr itself (timm's rule; each tower of a CLIP by itself). 1: all alike."""

    def __post_init__(self) -> None:
        _require(0 < self.layer_decay <= 1, "--layer-decay must be above 0 and at most 1", self.layer_decay)


@dataclass(frozen=True)
class SpeedOptions:
    """Time against memory."""

    gradient_checkpointing: bool = False
    """Keep fewer activations for the backward pass and compute the others again: less memory, more time."""
    torch_compile: bool = False
    """Compile the forward and backward passes with torch.compile."""
    channels_last: bool = False
    """Keep convolutions' weights and pictures in the order of memory that tensor cores like."""


@dataclass(frozen=True)
class RunOptions:
    """Where the results go."""

    output_dir: str | None = None
    """The run folder. Left out: runs/<script>-<date and time>."""
    overwrite: bool = False
    """Replace the run that the folder already holds (only a run's own files); refused otherwise."""
    report_to: tuple[str, ...] = ()
    """Trackers that metrics and pictures go to, beside the run folder's own files: tensorboard (in the run
    folder's logs/), wandb, mlflow and others that accelerate knows, or none. Left out: tensorboard, where it
    is installed."""

    def __post_init__(self) -> None:
        if self.report_to:
            from randlora_vision.training.harness.trackers import chosen_trackers

            chosen_trackers(self.report_to)


@dataclass(frozen=True)
class CheckpointOptions:
    """How a run that was cut off goes on."""

    checkpoint_every: Annotated[int, also("--checkpointing-steps")] = 0
    """Steps between two checkpoints in the run folder's checkpoints/; 0: none."""
    checkpoints_total_limit: int = 2
    """How many are kept; an older one is removed once a newer one is safely on disk."""
    resume: Annotated[str | None, also("--resume-from-checkpoint")] = None
    """'latest' (of --output-dir), or the path of a checkpoint. Training goes on to the very numbers of a
    run that was never cut off. Settings must be those of that run, but for these of their own, --output-dir,
    --overwrite, --report-to, --log-every, --workers, --eval-scales and --retention-data."""

    def __post_init__(self) -> None:
        _require(self.checkpoint_every >= 0, "--checkpoint-every must be 0 or more", self.checkpoint_every)
        limit = self.checkpoints_total_limit
        _require(limit >= 1, "--checkpoints-total-limit must be 1 or more", limit)


# What may differ when a run is resumed: nothing of it changes what is learnt.
FREE_SETTINGS = (
    "run",
    "checkpoints",
    "hub",
    "training.log_every",
    "training.workers",
    "evaluation.eval_scales",
    "evaluation.retention_data",
)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{expected}, got {got}")


def parse(options: type[_Options], argv: Sequence[str] | None, description: str) -> _Options:
    """Build `options` (a dataclass of option groups) from a command line, and the file that `--config` names.

    A mistake in either raises ValueError with one line; `--help` prints and exits. The groups' own
    names are no part of a flag: `training.lr` is `--lr`.
    """
    command_line = make_dataclass(
        "CommandLine",
        [("options", options, field(default_factory=options)), ("file", ConfigFile, field(default_factory=ConfigFile))],
    )
    words = expand_config(sys.argv[1:] if argv is None else argv, options)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            settings = (tyro.conf.OmitArgPrefixes,)
            return tyro.cli(command_line, args=words, description=description, config=settings).options
    except SystemExit as error:
        if error.code:
            raise ValueError(_one_line_complaint(complaint.getvalue())) from None
        raise


def _one_line_complaint(box: str) -> str:
    """Turn tyro's framed message into one line: what is wrong, then the flags that come close."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [one_line(section) for section in re.split("(?:─|-){10,}", "\n".join(lines))]
    if "╭" not in box:  # drawn without a frame, where the terminal has no UTF-8: the title is a section
        del sections[0]
    what, *rest = sections
    what = re.sub(r"^Error parsing (?!--)\S+: ", "", what).rstrip(".")  # an option group's name says nothing
    similar = [
        flag
        for section in rest
        if section.startswith(("Perhaps you meant", "Arguments similar to"))
        for flag in re.findall(r"(?<= )--(?!no-)[\w-]+", section.partition(":")[2])
    ]
    suggestion = f" Perhaps you meant {' or '.join(sorted(set(similar)))}." if similar else ""
    return f"{what}.{suggestion} (--help lists every option)"
