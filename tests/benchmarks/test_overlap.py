from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.overlap import TimedTrainer, shares
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.options import Training

now = [0.0]
"""The time on the clock, which only pauses move: other programs do not."""


def pause(length: int) -> None:
    now[0] += length


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        pause(4)
        return grad


class Data(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        pause(1)
        return torch.ones(3)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        pause(3)
        loss: Tensor = SlowBackward.apply(self.model(batch).square().mean())
        return loss


class Task:
    def __init__(self) -> None:
        self.loss = Loss()
        self.own_lr: dict[nn.Parameter, float] = {}
        self.batches: DataLoader[Any] = DataLoader(Data(), batch_size=1)

    def evaluate(self) -> dict[str, float]:
        return {"top1": 0.0}

    def check_gradients(self) -> list[str]:
        return []

    def save(self) -> str:
        return "nowhere"


def test_each_part_of_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading data takes 1, forward 3, backward 4 and the optimiser 2."""
    monkeypatch.setattr("benchmarks.overlap.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    options = Training(lr=0.1, steps=6, batch_size=1)
    trainer = TimedTrainer(Task(), options, make_accelerator(options), lambda *_: None)
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: pause(2))
    trainer.run()
    found = shares(trainer.times)
    for part, length in {"waiting for data": 1, "forward": 3, "backward": 4, "optimiser": 2}.items():
        assert found[part] == pytest.approx(length / 10, abs=0.03), part
    assert found["outside forward and backward"] == pytest.approx(0.3, abs=0.03)
    assert sum(found.values()) - found["outside forward and backward"] == pytest.approx(1)
    # Two of the six steps are warm-up, and in the last one no batch is loaded ahead.
    assert trainer.times["step"] in (39, 40)
