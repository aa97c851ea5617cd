"""The training loop of every script. It knows nothing of CLIP: a task brings the loss and the data."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from randlora_vision.training.optim import adamw, warmup_cosine
from randlora_vision.training.options import TrainingOptions

Log = Callable[[int, str, Mapping[str, float]], None]  # step, split, values


class Task(Protocol):
    """What is trained: any object with these five."""

    @property
    def loss(self) -> nn.Module:
        """A module that holds the model; called with a batch it returns the mean loss, a scalar."""

    @property
    def batches(self) -> DataLoader[Any]:
        """As many batches as all processes together consume."""

    def evaluate(self) -> dict[str, float]:
        """Return what is measured during training, by name."""

    def check_gradients(self) -> list[str]:
        """After the first backward: raise ValueError for a part that cannot learn; return notes."""

    def save(self) -> str:
        """Write what is trained and return where."""


@dataclass(frozen=True)
class Speed:
    """How long the steps took, evaluation left out."""

    seconds: float
    images_per_second: float


class Trainer:
    """Runs a task: AdamW, warm-up and cosine, accumulation, clipping, evaluation, saving.

    What was trained is saved at every evaluation, the one before the first step included, and only
    when everything measured is finite: the file on disk is always the last good state.
    """

    def __init__(self, task: Task, options: TrainingOptions, accelerator: Accelerator, log: Log) -> None:
        assert options.steps is not None and options.lr is not None, "resolve the options first"
        self.task = task
        self.options = options
        self.accelerator = accelerator
        self.log = log
        self.steps = options.steps
        self.parameters = [p for p in task.loss.parameters() if p.requires_grad]
        optimizer = adamw(self.parameters, options.lr, options.weight_decay)
        self.loss, self.optimizer, self.batches = accelerator.prepare(task.loss, optimizer, task.batches)
        # Not prepared: accelerate would step it once per process.
        self.schedule = warmup_cosine(optimizer, self.steps, round(options.warmup_fraction * self.steps))
        self.images_per_step = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        self.step = 0
        self.seconds = 0.0
        self.checked = False
        self.saved = "nothing was saved"

    def run(self) -> Speed:
        """Train to the last step; raises ValueError when the loss, a gradient or a result is not finite."""
        self._evaluate()
        recent = _Mean()
        batches = iter(self.batches)
        with tqdm(total=self.steps, unit="step", disable=not self.accelerator.is_main_process) as bar:
            while self.step < self.steps:
                started = time.perf_counter()
                lr = float(self.schedule.get_last_lr()[0])
                loss, grad_norm = self._optimise(batches)
                seconds = time.perf_counter() - started
                self.step += 1
                self.seconds += seconds
                recent.add({"loss": loss, "grad_norm": grad_norm, "seconds": seconds})
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.steps:
                    means = recent.take()
                    rate = self.images_per_step / means.pop("seconds")
                    self.log(self.step, "train", {**means, "lr": lr, "images_per_second": rate})
                    bar.set_postfix_str(f"loss {means['loss']:.3f}, lr {lr:.1e}, {rate:.0f} images/s")
                if self.step % self.options.eval_every == 0 or self.step == self.steps:
                    self._evaluate()
            next(batches, None)  # accelerate keeps a loader open until it is read to its end
        return Speed(self.seconds, self.steps * self.images_per_step / self.seconds)

    def _optimise(self, batches: Any) -> tuple[float, float]:
        """Do one optimiser step; return its mean loss over all processes, and the gradient's norm."""
        train_mode(self.loss)
        losses, norm = [], 0.0
        for _ in range(self.options.gradient_accumulation_steps):
            batch = next(batches)
            with self.accelerator.accumulate(self.loss):
                loss = self.loss(batch)
                losses.append(self._finite_loss(loss))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        return sum(losses) / len(losses), norm

    def _finite_loss(self, loss: torch.Tensor) -> float:
        value = float(self.accelerator.reduce(loss.detach().float(), reduction="mean"))
        if not math.isfinite(value):
            self._stop(f"the loss is {value}")
        return value

    def _clip(self) -> float:
        """Check the gradients of the first step, clip them to the allowed norm, return the norm."""
        scaled = self.accelerator.scaler is not None  # fp16: overflows are expected, and their steps skipped
        if not scaled:
            self._check_once()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm or math.inf)
        value = float(norm) if norm is not None else 0.0
        if math.isfinite(value):
            self._check_once()
        elif not scaled:
            self._stop(f"the norm of the gradient is {value}")
        return value

    def _check_once(self) -> None:
        if not self.checked:
            for note in self.task.check_gradients():
                self.accelerator.print(f"note: {note}")
            self.checked = True

    def _evaluate(self) -> None:
        with self.accelerator.autocast():
            values = self.task.evaluate()
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._stop(f"in evaluation {', '.join(broken)}")
        self.log(self.step, "val", values)
        self.saved = f"the state of step {self.step} is kept in {self.task.save()}"

    def _stop(self, reason: str) -> None:
        raise ValueError(
            f"training stopped after step {self.step}: {reason}; a lower --lr usually cures it ({self.saved})"
        )


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Return accelerate's view of devices, precision and processes.

    Raises ValueError when several processes were started that accelerate does not bring together:
    each would train alone and write to the same folder.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started but accelerate sees {accelerator.num_processes}: "
            "start CPU processes with the environment variable ACCELERATE_USE_CPU=true"
        )
    return accelerator


def train_mode(module: nn.Module) -> None:
    """Put a module in training mode, but batch normalisations: their running statistics are the base's.

    They are in no adapter file, so a base that moved them would not be the one the adapter is loaded on.
    """
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


class _Mean:
    """Means of values added since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Mapping[str, float]) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
