"""One run: a method, with one knob, rate and seed, on one task."""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from benchmarks.live import LiveBytes
from benchmarks.methods import trained_numbers
from benchmarks.quality.methods import METHODS, Method, knob_for
from benchmarks.quality.problems import Problem
from benchmarks.quality.tasks import Task, targets_of
from randlora_vision import save_adapter, suggest_lr
from randlora_vision.layers.adapted import adapted_modules
from randlora_vision.training.harness.optim import make_optimizer
from randlora_vision.training.harness.schedules import Schedule, warmup_schedule
from randlora_vision.training.methods.adaptation import SAMPLES

_T = TypeVar("_T")

RATE_STEP = 10**0.5
CENTRE_STEP = 0.01  # of the weights: the centre of the grid of RandLoRA
WARMUP = 0.1
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_TIMED_ROUNDS = 4


@dataclass(frozen=True)
class Run:
    """What identifies a run.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        budget: Index of RandLoRA's rank among those of the task; -1 for a method of one size.
        exponent: The rate is the centre of the method's grid times 10^(exponent / 2); a whole number in the grid.
        seed: Of samples, order, bases and initial values.
    """

    task: str
    method: str
    budget: int
    exponent: float
    seed: int


class Trainee:
    """A copy of the problem's model with a method applied, and the optimiser."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        knob: int,
        task: Task,
        exponent: float,
        seed: int,
        warmup: float = WARMUP,
        factor: float | None = None,
    ) -> None:
        """Take the rate of the grid; with a `factor`, that many times the default rate of RandLoRA instead."""
        self.problem = problem
        base = copy.deepcopy(problem.base)
        torch.manual_seed(seed)
        self.model = method.apply(base.requires_grad_(False), targets_of(base), knob, seed)
        self.trained = trained_numbers(self.model)
        if factor is None:
            self.lr = (method.lr or suggest_lr(self.model, CENTRE_STEP)) * RATE_STEP**exponent
        else:
            self.lr = factor * suggest_lr(
                self.model, features=partial(problem.features, self.model, problem.some(SAMPLES))
            )
        head = [parameter for parameter in problem.head.parameters() if parameter.requires_grad]
        head_lr = task.head_lr if self.trained else self.lr
        self.parameters = [*(p for p in self.model.parameters() if p.requires_grad), *head]
        self.optimizer = (
            make_optimizer("adamw", self.parameters, self.lr, _WEIGHT_DECAY, dict.fromkeys(head, head_lr))
            if self.parameters
            else None
        )
        self.warmup = round(warmup * task.steps)
        self.schedule = warmup_schedule(self.optimizer, Schedule(task.steps, self.warmup)) if self.optimizer else None
        self.model.train()

    def step(self) -> float:
        """Make one optimiser step; return the loss."""
        loss = self.problem.loss(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        assert self.optimizer is not None and self.schedule is not None  # there are parameters to train
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(loss.detach())

    def file_bytes(self) -> int:
        """Return the size of a file with what was trained, the head apart."""
        if any(True for _ in adapted_modules(self.model)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "adapter.safetensors"
                save_adapter(self.model, path)
                return path.stat().st_size
        return len(save({name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}))


def train(run: Run, task: Task, problem: Problem) -> dict[str, Any]:
    """Train and evaluate; return the fields of `run` with the figures."""
    method = METHODS[run.method]
    knob = knob_for(method, problem.base, targets_of(problem.base), task.ranks[run.budget])
    return {**asdict(run), "knob": knob, **outcome(Trainee(problem, method, knob, task, run.exponent, run.seed), task)}


def outcome(trainee: Trainee, task: Task) -> dict[str, Any]:
    """Train and evaluate; return the figures."""
    problem = trainee.problem
    losses = [trainee.step() for _ in range(task.steps)] if trainee.optimizer else [float(problem.loss(trainee.model))]
    figures = problem.figures(trainee.model)
    tail = losses[trainee.warmup :] or losses
    return {
        "lr": float(f"{trainee.lr:.3g}"),
        "trained": trainee.trained,
        "file_bytes": trainee.file_bytes(),
        "val": round(figures.val, 4),
        **{name: round(value, 4) for name, value in figures.tests.items()},
        "constant": figures.constant,
        "first_loss": round(losses[0], 4),
        "highest_loss_after_warmup": round(max(tail), 4),
        "last_loss": round(statistics.mean(losses[-max(1, len(losses) // 10) :]), 4),
    }


def step_ratios(task: Task, problem: Problem, names: Sequence[str], reference: str) -> Iterator[tuple[str, float]]:
    """Yield the processor time of a step of each method, relative to `reference`'s; all are stepped in turn.

    The budget is the second one of the task.
    """
    trainees = {}
    for name in {reference: None, **dict.fromkeys(names)}:
        method = METHODS[name]
        knob = knob_for(method, problem.base, targets_of(problem.base), task.ranks[1])
        trainees[name] = Trainee(problem, method, knob, task, 0, 0)
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(_TIMED_ROUNDS + 1):
        for name, trainee in trainees.items():
            if trainee.optimizer is None:
                continue
            started = time.process_time()
            trainee.step()
            times[name].append(time.process_time() - started)
    for name in names:
        ratios = [own / other for own, other in zip(times[name][1:], times[reference][1:], strict=False)]
        if ratios:
            yield name, round(statistics.median(ratios), 3)


def peak_bytes(task: Task, problem: Problem, name: str) -> int:
    """Return the most bytes of tensors that exist at once in two steps of a method at the second budget of the task.

    These are the weights, what is trained, its gradients and the optimiser's state, one batch, and what is kept for the
    backward pass. Of a method that trains nothing, those of an evaluation of the batch.
    """
    method = METHODS[name]
    problem = copy.copy(problem)
    few = torch.arange(problem.batch)
    problem.inputs, problem.answers, problem.order = problem.inputs[few], problem.answers[few], []
    trainee = Trainee(
        problem, method, knob_for(method, problem.base, targets_of(problem.base), task.ranks[1]), task, 0, 0
    )
    with LiveBytes() as live:
        live.see([*trainee.model.parameters(), *problem.head.parameters()])
        for _ in range(2):
            if trainee.optimizer:
                trainee.step()
            else:
                with torch.no_grad():
                    problem.loss(trainee.model)
    return live.peak


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file; a last one that a stop cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line to a JSONL file, which is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    """Return the lines of runs.jsonl by the run that each describes."""
    return read_by(Run, path)


def read_by(kind: type[_T], path: Path) -> dict[_T, dict[str, Any]]:
    """Return the lines of a JSONL file by what each describes, a `kind` of frozen dataclass."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return {kind(**{name: line[name] for name in names}): line for line in read_lines(path)}
