"""The training loop of every script; a task provides the loss and the data."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from randlora_vision.errors import Stopped
from randlora_vision.training.harness.accelerators import prepare_sharding, require_all_gradients
from randlora_vision.training.harness.checkpoints import Checkpoint, Checkpoints, check_state
from randlora_vision.training.harness.distributed import largest
from randlora_vision.training.harness.ema import Ema
from randlora_vision.training.harness.modes import train_mode
from randlora_vision.training.harness.optim import current_rates, make_optimizer
from randlora_vision.training.harness.optimizer_state import State
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.progress import BAR, Best, Log, Mean, best_of, peak_memory
from randlora_vision.training.harness.schedules import warmup_schedule
from randlora_vision.training.harness.seeding import seed_everything, seeded_items
from randlora_vision.training.harness.sharding import sharing
from randlora_vision.training.harness.stopping import StopRequests, failure_message, stop_message
from randlora_vision.training.harness.task import BoundedLoss, JointLoss, OwnBatches, Speed, Task


class Trainer:
    """Trains a task: optimiser, schedule, accumulation, clipping, averaging, evaluation, saving, early stopping.

    The trained parameters are saved at every evaluation, including the one before the first step, but only
    when every metric is finite: the file on disk is always the last good state. `keep_best()` is called after
    each new best evaluation, for example to copy that file; `after_save(step)` is called after every
    evaluation, for example to draw samples. Evaluations are logged as the split `evaluated`.

    Every forward pass starts from random states that depend on the seed, the process and the step, so a run
    resumed from a checkpoint computes the same numbers as an uninterrupted one.
    """

    def __init__(
        self,
        task: Task,
        options: Training,
        accelerator: Accelerator,
        log: Log,
        checkpoints: Checkpoints | None = None,
        resume: Checkpoint | None = None,
        keep_best: Callable[[], None] | None = None,
        after_save: Callable[[int], None] | None = None,
        stop: StopRequests | None = None,
        evaluated: str = "val",
    ) -> None:
        self.task = task
        self.options = options
        self.accelerator = accelerator
        self.log = log
        self.checkpoints = checkpoints
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        prepare_sharding(accelerator, task.loss, options, bool(resume or (checkpoints and checkpoints.every)))
        if self.deepspeed:
            self.checkpoints = None
        self.shapes = {name: tuple(p.shape) for name, p in task.loss.named_parameters() if p.requires_grad}
        trained = [parameter for parameter in task.loss.parameters() if parameter.requires_grad]
        usual = options.optimizer, trained, options.lr, options.weight_decay
        numbers = (options.beta1, options.beta2), options.eps, options.optimizer_arguments
        optimizer = make_optimizer(*usual, task.own_lr, *numbers)
        batches = seeded_items(task.batches, options.seed)
        self.loss, self.optimizer, self.batches = accelerator.prepare(task.loss, optimizer, batches)
        # Only now, because FSDP replaces the parameters of the model.
        self.names = {p: name for name, p in task.loss.named_parameters() if p.requires_grad}
        # accelerate's own optimiser would count the steps of all processes.
        self.plain_optimizer = self.optimizer.optimizer.optimizer if self.deepspeed else self.optimizer.optimizer
        self.shared = sharing(accelerator)(accelerator, self.loss, self.plain_optimizer, self.names)
        self.falls = 0  # of --schedule plateau
        self.schedule = self._schedule()
        self.ema = Ema({name: p for p, name in self.names.items()}, options.ema_decay) if options.ema_decay else None
        self.images_per_step = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        self.step = 0
        self.seconds = 0.0
        self.checked = False
        self.saved = "nothing was saved"
        self.recent = Mean()
        self.keep_best = keep_best
        self.after_save = after_save
        self.stop = stop or StopRequests()
        self.evaluated = evaluated
        self.best: Best | None = None
        if resume is not None:
            self._restore(resume.state)

    def run(self) -> Speed:
        """Train to the last step, or until early stopping.

        Raises ValueError when the loss, a gradient or a metric is not finite; Stopped when asked to stop.
        """
        if self.step == 0:
            self._evaluate()
        loader = self._remaining_batches()
        batches = iter(loader)
        silent = not self.accelerator.is_main_process
        with tqdm(total=self.options.steps, initial=self.step, unit="step", disable=silent, bar_format=BAR) as bar:
            while self.step < self.options.steps and not self._exhausted():
                started = time.perf_counter()
                rates = current_rates(self.plain_optimizer, self.options.lr * self.schedule.lr_lambdas[0](self.step))
                loss, grad_norm = self._optimise(batches)
                seconds = time.perf_counter() - started
                self.step += 1
                self.seconds += seconds
                self.recent.add({"loss": loss, "grad_norm": grad_norm, "seconds": seconds})
                if self.ema:
                    self.ema.update(self.step)
                bar.update()
                if self.step % self.options.log_every == 0 or self.step == self.options.steps:
                    means = self.recent.take()
                    rate = self.images_per_step / means.pop("seconds")
                    self.log(self.step, "train", {**means, **rates, "images_per_second": rate})
                    bar.set_postfix_str(
                        f"loss {means['loss']:.3f}, lr {rates['lr']:.1e}, {rate:.0f} img/s, {peak_memory():.1f} GB"
                    )
                if self.step % self.options.eval_every == 0 or self.step == self.options.steps:
                    self._evaluate()
                code = largest(self.stop.poll(), self.accelerator.device)
                if self.checkpoints is not None and (self.checkpoints.due(self.step) or code):
                    self.checkpoints.write(self._state())
                    self.accelerator.wait_for_everyone()
                if code:
                    self._close(loader, batches)
                    folder = self.checkpoints.folder if self.checkpoints else None
                    line = stop_message(code, self.step, self.options.steps, folder, self.saved)
                    raise Stopped("" if silent else line, code)
        self._close(loader, batches)
        if self.ema:
            self.ema.put_into_model()
        self.shared.keep_whole()
        rate = self.step * self.images_per_step / self.seconds
        return Speed(self.step, self.seconds, rate, peak_memory())

    def _close(self, loader: Any, batches: Any) -> None:
        """Close the loader, which accelerate otherwise keeps open until it is read to its end."""
        if self.step == self.options.steps:
            next(batches, None)
        elif isinstance(self.batches, OwnBatches):
            batches.close()
        elif loader in self.accelerator.gradient_state.dataloader_references:
            batches.close()
            loader.end()

    def _schedule(self, done: int = 0) -> LambdaLR:
        """Return the schedule of the learning rates after `done` steps, and set the rates."""
        return warmup_schedule(self.plain_optimizer, self.options.rates, done, self.falls)

    def _exhausted(self) -> bool:
        patience = self.options.early_stopping_patience
        return bool(patience and self.best and self.best.evaluations_since >= patience)

    def _optimise(self, batches: Any) -> tuple[float, float]:
        """Do one optimiser step; return its mean loss over all processes and the gradient norm."""
        train_mode(self.loss)
        losses, measured = [], (0.0, 0.0)
        for number, part in enumerate(self._parts(batches)):
            self._seed(number)
            with self.accelerator.accumulate(self.loss):
                loss = self.loss(part)
                losses.append(loss.detach().float())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    loss = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                    measured = self._clip(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if isinstance(self.task.loss, BoundedLoss):
            self.task.loss.clamp()
        self.schedule.step()
        return measured

    def _parts(self, batches: Any) -> Iterable[Any]:
        """Return the arguments of the loss in one optimiser step, in order."""
        parts = itertools.islice(batches, self.options.gradient_accumulation_steps)
        if self.options.gradient_accumulation_steps == 1 or not isinstance(self.task.loss, JointLoss):
            return parts
        with self.shared.whole(), self.accelerator.autocast():
            return self.task.loss.join(list(parts), self._seed)

    def _seed(self, part: int) -> None:
        seed_everything("step", self.options.seed, self.accelerator.process_index, self.step, part)

    def _clip(self, loss: torch.Tensor) -> tuple[float, float]:
        """Clip the gradients to the maximum norm; return the loss and the norm as finite numbers.

        Both are read from the device in one transfer, before the parameters change; nothing else in a step
        waits for the device. In the first step, the gradients are checked one by one.
        """
        scaled = self.accelerator.scaler is not None  # fp16: overflows are expected, and their steps are skipped
        if not (scaled or self.checked):
            self._require_finite("the loss", loss.item())
            self._check_once()
        norm = self.shared.clip_gradients(self.options.max_grad_norm or math.inf)
        value, length = torch.stack([loss, torch.zeros_like(loss) if norm is None else norm.to(loss)]).tolist()
        self._require_finite("the loss", value)
        if math.isfinite(length):
            self._check_once()
        elif not scaled:
            self._require_finite("the norm of the gradient", length)
        return value, length

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._stop(f"{what} is {value}")

    def _check_once(self) -> None:
        if not self.checked and not self.deepspeed:  # which hides its gradients
            with self.shared.whole_gradients():
                for note in self.task.check_gradients():
                    self.accelerator.print(f"note: {note}")
                require_all_gradients(self.accelerator, self.names)
        self.checked = True

    def _evaluate(self) -> None:
        with self.ema.applied() if self.ema else contextlib.nullcontext(), self.shared.whole():
            with self.accelerator.autocast():
                # All processes use the values of the first, since all must stop at the same step.
                (values,) = broadcast_object_list([self.task.evaluate()])
            self._keep(values)

    def _keep(self, values: dict[str, float]) -> None:
        """Log the metrics and save the parameters, unless a metric is not finite."""
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._stop(f"in evaluation, {', '.join(broken)}")
        self.log(self.step, self.evaluated, values)
        self.saved = f"the state of step {self.step} is kept in {self.task.save()}"
        plateau = self.options.schedule == "plateau"
        if self.keep_best or self.options.early_stopping_patience or plateau:
            self.best = best_of(self.best, self.step, values, self.options.best_metric)
            if self.keep_best is not None and self.best.step == self.step:
                self.keep_best()
            if plateau:
                self._fall(self.best.evaluations_since)
        if self.after_save is not None:
            self.after_save(self.step)

    def _fall(self, evaluations: int) -> None:
        """Lower the learning rate after every so many evaluations without an improvement."""
        if self.step > self.options.warmup and evaluations and evaluations % (self.options.plateau_patience + 1) == 0:
            self.falls += 1
            self.schedule = self._schedule(self.step)

    def _remaining_batches(self) -> Any:
        done = self.step * self.options.gradient_accumulation_steps
        if isinstance(self.batches, OwnBatches):
            device = self.accelerator.device
            return (send_to_device(batch, device, non_blocking=True) for batch in self.batches.after(done))
        return self.accelerator.skip_first_batches(self.batches, done) if done else self.batches

    def _state(self) -> State:
        """Return the contents of a checkpoint, without random states, which follow from the step."""
        optimizer = self.shared.optimizer_state()
        scaler = self.accelerator.scaler
        values = {
            "optimizer": optimizer.values,
            "scaler": None if scaler is None else scaler.state_dict(),
            "recent": self.recent.state(),
            "seconds": self.seconds,
            "falls": self.falls,
            "best": asdict(self.best) if self.best else None,
        }
        tensors = {f"parameters/{name}": tensor for name, tensor in self.shared.parameters().items()}
        if self.ema:
            with self.ema.applied():
                tensors |= {f"ema/{name}": tensor for name, tensor in self.shared.parameters().items()}
        return State(self.step, values, {**tensors, **optimizer.tensors})

    def _restore(self, state: State) -> None:
        values = check_state(state, self.shapes, self.ema is not None)
        self.shared.load_optimizer(State(state.step, values["optimizer"], state.tensors))
        if self.ema:
            self.shared.load_parameters({name: state.tensors[f"ema/{name}"] for name in self.shapes})
            self.ema.take_from_model()
        self.shared.load_parameters({name: state.tensors[f"parameters/{name}"] for name in self.shapes})
        self.falls = values["falls"]
        # The rates follow from the step, so that a run may go on for more steps than it first asked for.
        self.schedule = self._schedule(state.step)
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.best = Best(**values["best"]) if values["best"] else None
        self.recent = Mean(*values["recent"])
        self.seconds = values["seconds"]
        self.step = state.step

    def _stop(self, what: str) -> None:
        raise ValueError(failure_message(what, self.step, self.saved))
