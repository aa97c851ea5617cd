from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.modes import train_mode
from randlora_vision.training.harness.optim import decay_groups
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.progress import wrapped
from randlora_vision.training.harness.schedules import Schedule

DATA = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


class Fit(nn.Module):
    """Mean squared distance of a linear map to the sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.factor = 1.0  # set to spoil the loss

    def forward(self, batch: Tensor) -> Tensor:
        return self.factor * (self.model(batch)[:, 0] - batch.sum(dim=1)).square().mean()


class FitTask:
    own_lr: Mapping[nn.Parameter, float] = {}

    def __init__(self, batch_size: int, batches: int, path: Path | None = None) -> None:
        self.loss = Fit()
        data = DATA.repeat(batches * batch_size // len(DATA) + 1, 1)[: batches * batch_size]
        self.batches: DataLoader[Any] = DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]
        self.path = path
        self.saved: list[float] = []
        self.checks = 0
        self.gradients: list[Tensor] = []
        self.score = 0.0

    def evaluate(self) -> dict[str, float]:
        self.loss.eval()
        return {"score": self.score}

    def check_gradients(self) -> list[str]:
        self.checks += 1
        assert self.loss.model.weight.grad is not None
        self.gradients.append(self.loss.model.weight.grad.clone())
        return ["a note"]

    def save(self) -> str:
        self.saved.append(self.loss.model.weight[0, 0].item())
        return "adapter.file"


class Log(list):
    def __call__(self, step: int, split: str, values: Mapping[str, float]) -> None:
        json.dumps(values)
        self.append((step, split, dict(values)))

    def of(self, split: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, values) for step, other, values in self if other == split]


def trainer(task: FitTask, log: Log | None = None, **options: Any) -> Trainer:
    settings = Training(**{"lr": 0.1, "steps": 4, "batch_size": 4, "warmup_fraction": 0.0, **options})
    for state in (AcceleratorState, GradientState, PartialState):  # process-wide, with other settings in it
        state._shared_state.clear()
    return Trainer(task, settings, make_accelerator(settings), Log() if log is None else log)


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate sees 1: .*ACCELERATE_USE_CPU"):
        trainer(FitTask(batch_size=4, batches=4))


def test_training_lowers_the_loss_and_logs_it(capsys: pytest.CaptureFixture[str]) -> None:
    task, log = FitTask(batch_size=4, batches=40), Log()
    speed = trainer(task, log, steps=40, log_every=10, eval_every=15).run()
    losses = [values["loss"] for _, values in log.of("train")]
    assert losses[-1] < 0.05 * losses[0]
    assert [step for step, _ in log.of("train")] == [10, 20, 30, 40]
    assert set(log.of("train")[0][1]) == {"loss", "lr", "grad_norm", "images_per_second"}
    assert [step for step, _ in log.of("val")] == [0, 15, 30, 40]
    assert len(task.saved) == 4
    assert speed.images_per_second == pytest.approx(40 * 4 / speed.seconds)
    assert 0.05 < speed.peak_memory < 100  # GB, for a process that has imported torch
    assert "note: a note" in capsys.readouterr().out
    assert task.checks == 1


def test_accumulated_gradients_are_the_big_batchs() -> None:
    big = FitTask(batch_size=16, batches=3)
    trainer(big, steps=3, batch_size=16).run()
    small, log = FitTask(batch_size=4, batches=12), Log()
    trainer(small, log, steps=3, batch_size=4, gradient_accumulation_steps=4, log_every=1).run()
    torch.testing.assert_close(small.gradients[0], big.gradients[0])
    torch.testing.assert_close(small.loss.model.weight, big.loss.model.weight)
    expected = Fit()(DATA).item()
    assert log.of("train")[0][1]["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])  # 0: no clipping
def test_gradients_are_clipped_to_the_norm(limit: float) -> None:
    task, log = FitTask(4, 1), Log()
    loop = trainer(task, log, steps=1, max_grad_norm=limit)
    seen: list[float] = []
    loop.optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(math.hypot(*(p.grad.norm().item() for p in loop.names)))
    )
    loop.run()
    norm = log.of("train")[0][1]["grad_norm"]
    assert norm > 0.5
    assert seen == [pytest.approx(0.5 if limit == 0.5 else norm, rel=1e-4)]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(factor: float) -> None:
    task = FitTask(batch_size=4, batches=8)
    task_losses = task.loss.forward
    calls = iter(range(100))
    task.loss.forward = lambda batch: (factor if next(calls) == 5 else 1.0) * task_losses(batch)  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError) as stopped:
        trainer(task, steps=8, eval_every=4).run()
    message = str(stopped.value)
    assert "training stopped after step 5: the loss is" in message
    assert "a lower --lr usually helps (the state of step 4 is kept in adapter.file" in message
    assert len(task.saved) == 2 and all(math.isfinite(value) for value in task.saved)
    assert task.loss.model.weight.isfinite().all()


def test_the_rate_is_not_blamed_before_anything_is_trained() -> None:
    task = FitTask(batch_size=4, batches=4)
    forward = task.loss.forward
    task.loss.forward = lambda batch: math.nan * forward(batch)  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match="after step 0: the loss is nan; nothing has been trained yet, .*not to --lr"):
        trainer(task).run()


def test_a_gradient_that_is_not_finite_stops() -> None:
    task = FitTask(batch_size=4, batches=4)
    calls = iter(range(100))
    task.loss.model.weight.register_hook(lambda grad: grad * (math.nan if next(calls) == 2 else 1.0))
    with pytest.raises(ValueError, match="after step 2: the norm of the gradient is nan"):
        trainer(task).run()
    assert task.loss.model.weight.isfinite().all()


def test_a_result_that_is_not_finite_stops_before_it_is_saved() -> None:
    task = FitTask(batch_size=4, batches=4)
    task.score = math.nan
    with pytest.raises(ValueError, match="in evaluation, score is nan.*nothing was saved"):
        trainer(task).run()
    assert task.saved == []


def test_bf16_runs_the_forward_in_bf16_and_keeps_float32_weights() -> None:
    task = FitTask(batch_size=4, batches=2)
    seen = []
    task.loss.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer(task, steps=2, mixed_precision="bf16").run()
    assert set(seen) == {torch.bfloat16}
    assert task.loss.model.weight.dtype == torch.float32


def test_the_schedule_reaches_the_optimiser_and_the_log() -> None:
    log = Log()
    trainer(FitTask(4, 10), log, steps=10, warmup_fraction=0.2, log_every=1).run()
    rates = [values["lr"] for _, values in log.of("train")]
    assert rates == pytest.approx([0.1 * Schedule(10, 2).factor(step) for step in range(10)])


def test_vectors_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    groups = decay_groups(model.parameters(), weight_decay=0.3)
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed == {id(model[0].weight): 0.3, id(model[1].weight): 0.0, id(model[1].bias): 0.0}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        decay_groups(nn.Linear(2, 2).requires_grad_(False).parameters(), 0.0)


def test_batch_statistics_stay_the_bases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    train_mode(model)
    model(torch.randn(2, 3, 4, 4))
    assert model[1].running_mean.eq(0).all()
    assert model[2].training and not model[1].training


def test_lines_break_at_spaces_but_tables_and_code_do_not() -> None:
    prose, code, table = "one two three four five", "    model = create(one, two)", "a  b  c  d  e  f  g"
    assert wrapped(f"{prose}\n{code}\n{table}", 12) == f"one two\n  three four\n  five\n{code}\n{table}"
    assert wrapped("a-path/that-is-too-long", 12) == "a-path/that-is-too-long"


def test_the_names_in_a_table_become_shorter_so_that_it_fits() -> None:
    head, rule = "target                kind    trained", "-" * 37
    table = f"{head}\n{rule}\nblocks.*.attn.qkv     linear       32"
    text = wrapped(f"{table}\n\nadapter: one two three four five six", 30)
    assert text.split("\n") == [
        "target         kind    trained",
        "------------------------------",
        "…s.*.attn.qkv  linear       32",
        "",
        "adapter: one two three four",
        "  five six",
    ]
    assert wrapped(table, 80) == table
