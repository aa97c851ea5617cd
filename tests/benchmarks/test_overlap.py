from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.overlap import TimedTrainer, shares
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.options import Training

PAUSE = 0.04  # seconds


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(4 * PAUSE)
        return grad


class Data(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(PAUSE)
        return torch.ones(3)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        time.sleep(3 * PAUSE)
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


def test_each_part_of_a_step_is_found() -> None:
    """Loading data takes 1 pause, forward 3, backward 4 and the optimiser 2."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    options = Training(lr=0.1, steps=6, batch_size=1)
    trainer = TimedTrainer(Task(), options, make_accelerator(options), lambda *_: None)
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: time.sleep(2 * PAUSE))
    trainer.run()
    found = shares(trainer.times)
    for part, pauses in {"waiting for data": 1, "forward": 3, "backward": 4, "optimiser": 2}.items():
        assert found[part] == pytest.approx(pauses / 10, abs=0.08), part
    assert found["outside forward and backward"] == pytest.approx(0.3, abs=0.1)
    assert sum(found.values()) - found["outside forward and backward"] == pytest.approx(1)
    # Two of the six steps are warm-up. A sleep may be slightly shorter than requested.
    assert trainer.times["step"] > 0.9 * 4 * 10 * PAUSE
