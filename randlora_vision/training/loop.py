"""The training loop of every script. It knows nothing of CLIP: a task brings the loss and the data."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from randlora_vision.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    State,
    optimizer_state,
    restore_optimizer,
    to_cpu,
)
from randlora_vision.training.ema import Ema
from randlora_vision.training.optim import make_optimizer, warmup_schedule
from randlora_vision.training.options import TrainingOptions
from randlora_vision.training.progress import Best, Mean, best_of
from randlora_vision.training.seeding import seed_everything, seeded_items

Log = Callable[[int, str, Mapping[str, float]], None]  # step, split, values


class Task(Protocol):
    """What is trained: any object with these five."""

    @property
    def loss(self) -> nn.Module:
        """A module that holds the model; called with a batch it returns the mean loss, a scalar."""

    @property
    def batches(self) -> DataLoader[Any]:
        """As many batches as all processes together consume, in an order that depends on nothing but a seed."""

    def evaluate(self) -> dict[str, float]:
        """Return what is measured during training, by name."""

    def check_gradients(self) -> list[str]:
        """After the first backward: raise ValueError for a part that cannot learn; return notes."""

    def save(self) -> str:
        """Write what is trained and return where."""


@dataclass(frozen=True)
class Speed:
    """How many steps were made, and how long they took, evaluation left out."""

    steps: int
    seconds: float
    images_per_second: float


class Trainer:
    """Runs a task: optimiser, schedule, accumulation, clipping, averaging, evaluation, saving, early stopping.

    What was trained is saved at every evaluation, the one before the first step included, and only
    when everything measured is finite: the file on disk is always the last good state. After the best
    evaluation so far `keep_best` is called, which may keep a copy of that file.

    Every forward pass starts from random states that follow from the seed, the process and the step,
    so a run that continues from a checkpoint computes what one that was never cut off does.
    """

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        accelerator: Accelerator,
        log: Log,
        checkpoints: Checkpoints | None = None,
        resume: Checkpoint | None = None,
        own_lr: Mapping[nn.Parameter, float] | None = None,
        keep_best: Callable[[], None] | None = None,
    ) -> None:
        assert options.steps is not None and options.lr is not None, "resolve the options first"
        self.task = task
        self.options = options
        self.accelerator = accelerator
        self.log = log
        self.steps = options.steps
        self.checkpoints = checkpoints
        self.names = {p: name for name, p in task.loss.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        optimizer = make_optimizer(options.optimizer, self.parameters, options.lr, options.weight_decay, own_lr)
        batches = seeded_items(task.batches, options.seed)
        self.loss, self.optimizer, self.batches = accelerator.prepare(task.loss, optimizer, batches)
        # Not prepared: accelerate would step it once per process.
        warmup = round(options.warmup_fraction * self.steps)
        self.schedule = warmup_schedule(optimizer, self.steps, warmup, options.schedule)
        self.ema = Ema({name: p for p, name in self.names.items()}, options.ema_decay) if options.ema_decay else None
        self.images_per_step = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        self.step = 0
        self.seconds = 0.0
        self.checked = False
        self.saved = "nothing was saved"
        self.recent = Mean()
        self.keep_best = keep_best
        self.best: Best | None = None
        if resume is not None:
            self._restore(resume.state)

    def run(self) -> Speed:
        """Train to the last step, or to where patience ends.

        Raises ValueError when the loss, a gradient or a result is not finite.
        """
        if self.step == 0:
            self._evaluate()
        loader = self._remaining_batches()
        batches = iter(loader)
        silent = not self.accelerator.is_main_process
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=silent) as bar:
            while self.step < self.steps and not self._exhausted():
                started = time.perf_counter()
                lr = float(self.schedule.get_last_lr()[0])
                loss, grad_norm = self._optimise(batches)
                seconds = time.perf_counter() - started
                self.step += 1
                self.seconds += seconds
                self.recent.add({"loss": loss, "grad_norm": grad_norm, "seconds": seconds})
                if self.ema:
                    self.ema.update(self.step)
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.steps:
                    means = self.recent.take()
                    rate = self.images_per_step / means.pop("seconds")
                    self.log(self.step, "train", {**means, "lr": lr, "images_per_second": rate})
                    bar.set_postfix_str(f"loss {means['loss']:.3f}, lr {lr:.1e}, {rate:.0f} images/s")
                if self.step % self.options.eval_every == 0 or self.step == self.steps:
                    self._evaluate()
                if self.checkpoints is not None and self.checkpoints.due(self.step):
                    self.checkpoints.write(self._state())
                    self.accelerator.wait_for_everyone()
        self._close(loader, batches)
        if self.ema:
            self.ema.put_into_model()
        return Speed(self.step, self.seconds, self.step * self.images_per_step / self.seconds)

    def _close(self, loader: Any, batches: Any) -> None:
        """Tell accelerate, which keeps a loader open until it is read to its end, that this one is done with."""
        if self.step == self.steps:
            next(batches, None)
        elif loader in self.accelerator.gradient_state.dataloader_references:
            batches.close()
            loader.end()

    def _exhausted(self) -> bool:
        patience = self.options.early_stopping_patience
        return bool(patience and self.best and self.best.evaluations_since >= patience)

    def _optimise(self, batches: Any) -> tuple[float, float]:
        """Do one optimiser step; return its mean loss over all processes, and the gradient's norm."""
        train_mode(self.loss)
        losses, norm = [], 0.0
        for part in range(self.options.gradient_accumulation_steps):
            batch = next(batches)
            seed_everything("step", self.options.seed, self.accelerator.process_index, self.step, part)
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
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            with self.accelerator.autocast():
                # The first process's values are everyone's: all of them must stop at the same step.
                (values,) = broadcast_object_list([self.task.evaluate()])
            self._keep(values)

    def _keep(self, values: dict[str, float]) -> None:
        """Log and save what was measured, unless it is broken."""
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._stop(f"in evaluation {', '.join(broken)}")
        self.log(self.step, "val", values)
        self.saved = f"the state of step {self.step} is kept in {self.task.save()}"
        if self.keep_best is not None or self.options.early_stopping_patience:
            self.best = best_of(self.best, self.step, values, self.options.best_metric)
            if self.keep_best is not None and self.best.step == self.step:
                self.keep_best()

    def _remaining_batches(self) -> Any:
        done = self.step * self.options.gradient_accumulation_steps
        return self.accelerator.skip_first_batches(self.batches, done) if done else self.batches

    def _state(self) -> State:
        """Return what a checkpoint holds. Random states are not among it: they follow from the step."""
        optimizer = optimizer_state(self.optimizer.optimizer, self.names)
        scaler = self.accelerator.scaler
        values = {
            "optimizer": optimizer.values,
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "recent": self.recent.state(),
            "seconds": self.seconds,
            "best": asdict(self.best) if self.best else None,
        }
        parameters = {f"parameters/{name}": to_cpu(p) for p, name in self.names.items()}
        averages = {f"ema/{name}": to_cpu(average) for name, average in self.ema.averages.items()} if self.ema else {}
        return State(self.step, values, {**parameters, **averages, **optimizer.tensors})

    def _restore(self, state: State) -> None:
        values = state.values
        saved = {name: tensor for name, tensor in state.tensors.items() if name.startswith("parameters/")}
        own = {f"parameters/{name}": parameter for parameter, name in self.names.items()}
        if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in saved.items()}:
            raise ValueError(f"the checkpoint of step {state.step} holds other parameters than those trained here")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        restore_optimizer(self.optimizer.optimizer, self.names, State(state.step, values["optimizer"], state.tensors))
        self.schedule.load_state_dict(values["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.ema:
            self.ema.load({name: state.tensors[f"ema/{name}"] for name in self.ema.averages})
        self.best = Best(**values["best"]) if values["best"] else None
        self.recent = Mean(*values["recent"])
        self.seconds = values["seconds"]
        self.step = state.step

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
