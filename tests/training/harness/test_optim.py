"""Optimisers by name, schedules, moving averages, and the choice of the best state."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.checkpoints import (
    Checkpoint,
    Checkpoints,
    list_checkpoints,
    read_checkpoint,
)
from randlora_vision.training.harness.ema import Ema
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.optim import _fused, decay_groups, make_optimizer
from randlora_vision.training.harness.optimizer_state import State, optimizer_state, restore_optimizer
from randlora_vision.training.harness.options import CheckpointOptions, Training, TrainingOptions
from randlora_vision.training.harness.progress import Best
from randlora_vision.training.harness.seeding import seed_everything

USUAL = ("adamw", "sgd", "lion", "lookahead_adamw")
CUDA_ONLY = ("bnb", "fused")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def through_json(state: State) -> State:
    return State(state.step, json.loads(json.dumps(state.values)), state.tensors)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for step in steps:
        seed_everything(step)
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)
        for name in sorted({*USUAL, *list_optimizers()} - {"adahessian"})
        if not name.startswith(CUDA_ONLY)
    ],
)
@pytest.mark.filterwarnings("ignore")  # from timm and PyTorch, about the chosen optimiser
@torch.compiler.set_stance("force_eager")  # kron compiles parts of a step, which takes half a minute
def test_an_optimiser_goes_on_exactly_from_what_a_checkpoint_holds(name: str) -> None:
    first, second = network(), network()
    optimizers = [make_optimizer(name, model.parameters(), 1e-3, 0.01) for model in (first, second)]
    train(first, optimizers[0], range(7))
    held = optimizer_state(optimizers[0], names(first))
    second.load_state_dict(first.state_dict())
    restore_optimizer(optimizers[1], names(second), through_json(held))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        train(model, optimizer, range(7, 13))  # lookahead acts at every sixth step
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, network()[0].weight)


def test_the_real_8_bit_adam_goes_on_exactly_from_what_a_checkpoint_holds() -> None:
    """On a CPU too, for which timm's factory refuses it; its states of 4096 numbers or more have 8 bits."""
    pytest.importorskip("bitsandbytes")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(6, 1024), nn.Linear(1024, 3)))
    optimizers = [make_optimizer("bnbadamw8bit", model.parameters(), 1e-2, 0.01) for model in models]
    train(models[0], optimizers[0], range(4))
    held = optimizer_state(optimizers[0], names(models[0]))
    assert torch.uint8 in {tensor.dtype for tensor in held.tensors.values()}
    models[1].load_state_dict(models[0].state_dict())
    restore_optimizer(optimizers[1], names(models[1]), through_json(held))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4, 8))
    assert all(torch.equal(one, other) for one, other in zip(*(model.parameters() for model in models), strict=True))


def test_8_bits_are_8_bits_where_timm_names_the_class_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    older = SimpleNamespace(opt_class="bitsandbytes.optim.AdamW", defaults=None)  # as in timm 1.0.21
    monkeypatch.setattr("timm.optim.get_optimizer_info", lambda name: older)
    parameters = nn.Linear(6, 1024).parameters()
    assert type(make_optimizer("bnbadamw8bit", parameters, 1e-2, 0.0)).__name__ == "AdamW8bit"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamww", "--optimizer adamww is not known; close matches: adamw"),
        ("xyz123", "--optimizer xyz123 is not known; timm.optim.list_optimizers\\(\\) names"),
        ("lookahead_xyz123", "is not known"),
        ("adahessian", "--optimizer adahessian is not known"),
    ],
)
def test_unknown_optimisers_are_refused_when_the_options_are_built(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TrainingOptions(optimizer=name)


def test_an_optimiser_that_lacks_its_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("no apex")

    monkeypatch.setattr("timm.optim.create_optimizer_v2", missing)
    with pytest.raises(ValueError, match="--optimizer fusedadam cannot be used here: ImportError no apex"):
        make_optimizer("fusedadam", network().parameters(), 0.1, 0.0)


def test_prodigy_needs_its_package_and_one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="--optimizer prodigy needs its package: pip install prodigyopt"):
        make_optimizer("prodigy", model.parameters(), 1.0, 0.0)
    with pytest.raises(ValueError, match="prodigy has one rate for all parameters, --lr 1, but some have 0.5"):
        make_optimizer("prodigy", model.parameters(), 1.0, 0.0, {model[0].weight: 0.5})
    assert TrainingOptions(optimizer="prodigy").lr == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_prodigy_is_that_of_diffusers_scripts_and_goes_on_from_a_checkpoint(decay: float) -> None:
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    models = network(), network(), network()
    usual = {"use_bias_correction": True, "safeguard_warmup": True}
    theirs = prodigy(decay_groups(models[0].parameters(), decay), betas=(0.8, 0.999), **usual)
    ours = [make_optimizer("prodigy", model.parameters(), 1.0, decay, None, (0.8, None)) for model in models[1:]]
    for model, optimizer in zip(models, [theirs, ours[0]], strict=False):
        train(model, optimizer, range(50))
    held = optimizer_state(ours[0], names(models[1]))
    models[2].load_state_dict(models[1].state_dict())
    restore_optimizer(ours[1], names(models[2]), through_json(held))
    for model, optimizer in zip(models, [theirs, *ours], strict=True):
        train(model, optimizer, range(50, 60))
    for one, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert theirs.param_groups[0]["d"] > 1e-6


def test_betas_and_epsilon_replace_those_of_the_optimiser() -> None:
    def groups(name: str, *given: Any) -> dict[str, Any]:
        return make_optimizer(name, network().parameters(), 0.1, 0.0, None, *given).param_groups[0]

    assert groups("adamw")["betas"] == (0.9, 0.999)
    assert groups("adamw", (None, 0.95), 1e-3)["betas"] == (0.9, 0.95)
    assert groups("adamw", (None, None), 1e-3)["eps"] == 1e-3
    assert groups("lion", (0.5, None))["betas"] == (0.5, 0.99)
    for name in ("sgd", "adan"):
        with pytest.raises(ValueError, match=f"--optimizer {name} does not have two betas"):
            groups(name, (0.5, None))


def test_other_arguments_of_an_optimiser() -> None:
    def group(name: str, **arguments: Any) -> dict[str, Any]:
        return make_optimizer(name, network().parameters(), 0.1, 0.0, arguments=arguments).param_groups[0]

    assert (group("sgd")["momentum"], group("sgd", momentum=0.8, nesterov=False)["momentum"]) == (0.9, 0.8)
    assert group("adamw", amsgrad=True)["amsgrad"]
    for name in ("adamw", "lion", "lookahead_sgd"):
        with pytest.raises(ValueError, match=f"--optimizer {name} cannot be used here: TypeError .*'nonsense'"):
            group(name, nonsense=1)


def test_the_default_is_pytorchs_adamw() -> None:
    first, second = network(), network()
    train(first, make_optimizer("adamw", first.parameters(), 0.01, 0.1), range(5))
    train(second, torch.optim.AdamW(decay_groups(second.parameters(), 0.1), lr=0.01), range(5))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_the_kernel_for_all_parameters_at_once_is_asked_for_on_a_gpu_only() -> None:
    def parameters(*devices: str) -> list[Any]:
        return [SimpleNamespace(is_cuda=device == "cuda", is_floating_point=lambda: True) for device in devices]

    assert _fused("adamw", parameters("cuda", "cuda")) == {"fused": True}
    assert _fused("lion", parameters("cuda")) == _fused("adamw", parameters("cuda", "cpu")) == {}


def test_parameters_with_a_rate_of_their_own() -> None:
    model = network()
    model[1].requires_grad_(False)
    own = {parameter: 0.5 for parameter in model[2].parameters()}
    groups = make_optimizer("sgd", model.parameters(), 0.1, 0.3, own).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        id(model[0].weight): (0.1, 0.3),
        id(model[0].bias): (0.1, 0.0),
        id(model[2].weight): (0.5, 0.3),
        id(model[2].bias): (0.5, 0.0),
    }
    only = make_optimizer("sgd", model[2].parameters(), 0.1, 0.3, own).param_groups
    assert [group["lr"] for group in only] == [0.5, 0.5]


def test_averages_follow_the_formula_and_are_applied_for_a_while() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"x": parameter}, decay=0.3)
    expected = 1.0
    for step, value in enumerate([2.0, 5.0, 3.0], start=1):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with ema.applied():
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == 3.0
    ema.put_into_model()
    assert parameter.item() == pytest.approx(expected)


# In the loop


class Fit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return (self.model(batch)[:, 0] - batch.sum(dim=1)).square().mean()


class FitTask:
    own_lr: Mapping[nn.Parameter, float] = {}

    """A task with a given score per evaluation."""

    def __init__(self, scores: Mapping[int, float] | None = None) -> None:
        self.loss = Fit()
        data = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        self.batches: DataLoader[Any] = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
        self.scores = iter(scores.values()) if scores else None
        self.measured: list[float] = []

    def evaluate(self) -> dict[str, float]:
        self.measured.append(self.loss.model.weight[0, 0].item())
        return {"top1": next(self.scores) if self.scores else 0.0, "loss": float(len(self.measured))}

    def check_gradients(self) -> list[str]:
        return []

    def save(self) -> str:
        return "nowhere"


def trainer(
    task: FitTask,
    resume: Checkpoint | None = None,
    kept: list[int] | None = None,
    log: Any = lambda *_: None,
    **options: Any,
) -> Trainer:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    settings = Training(**{"lr": 0.1, "steps": 10, "batch_size": 4, "eval_every": 1, **options})
    keep_best = None if kept is None else lambda: kept.append(len(task.measured) - 1)
    return Trainer(task, settings, make_accelerator(settings), log, resume=resume, keep_best=keep_best)


SCORES = dict(enumerate([0.1, 0.5, 0.4, 0.6, 0.6, 0.2, 0.7, 0.7, 0.7, 0.7, 0.7]))


def test_training_stops_after_so_many_evaluations_without_a_better_one() -> None:
    kept: list[int] = []
    loop = trainer(FitTask(SCORES), kept=kept, early_stopping_patience=2)
    speed = loop.run()
    assert kept == [0, 1, 3]  # ties do not count as an improvement
    assert speed.steps == loop.step == 5
    assert loop.best == Best(step=3, value=0.6, evaluations_since=2)
    assert speed.images_per_second == pytest.approx(5 * 4 / speed.seconds)
    assert not [loader for loader in GradientState().dataloader_references if loader is not None]


def test_without_patience_the_best_is_kept_and_training_goes_on() -> None:
    kept: list[int] = []
    loop = trainer(FitTask(SCORES), kept=kept)
    assert loop.run().steps == 10 and kept == [0, 1, 3, 6]


def test_a_plateau_falls_as_pytorchs_and_goes_on_from_a_checkpoint() -> None:
    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, "max", 0.5, patience=2, threshold=0)
    expected = []
    for score in scores:
        scheduler.step(score)
        expected.append(theirs.param_groups[0]["lr"])
    states: dict[int, State] = {}

    def rates(first: int) -> list[float]:
        found = []
        loop = trainer(
            FitTask(dict(enumerate(scores[first:]))),
            log=lambda _, split, values: found.append(values["lr"]) if split == "train" else None,
            **{"lr": 1.0, "schedule": "plateau", "decay_rate": 0.5, "plateau_patience": 2, "warmup_steps": 0},
            log_every=1,
        )
        loop.after_save = lambda step: states.update({step: through_json(loop._state())})
        if first:
            loop._restore(states[first - 1])
        loop.run()
        return found

    assert rates(0) == expected[:-1] and expected[-1] < expected[5] < 1
    assert rates(5) == expected[4:-1] and rates(9) == expected[8:-1]


def test_of_a_loss_the_smaller_is_the_better() -> None:
    kept: list[int] = []
    assert trainer(FitTask(), kept=kept, best_metric="loss", early_stopping_patience=3).run().steps == 3
    assert kept == [0]


def test_a_metric_that_is_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="--best-metric f1 is not measured; choose one of top1, loss"):
        trainer(FitTask(), kept=[], best_metric="f1").run()


def test_the_averages_are_what_is_measured_and_left_in_the_model() -> None:
    plain, averaged = FitTask(), FitTask()
    trainer(plain).run()
    loop = trainer(averaged, ema_decay=0.5)
    loop.run()
    expected = [plain.measured[0]]  # the weights after every step are those of a run without averages
    for step, value in enumerate(plain.measured[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert averaged.measured == pytest.approx(expected, rel=1e-4)
    assert averaged.loss.model.weight[0, 0].item() == averaged.measured[-1]
    assert not math.isclose(plain.measured[-1], averaged.measured[-1], rel_tol=1e-3)


def test_averages_and_patience_are_resumed(tmp_path: Path) -> None:
    options = {"ema_decay": 0.5, "early_stopping_patience": 2, "optimizer": "lookahead_adamw", "schedule": "linear"}
    whole = FitTask(SCORES)
    loop = trainer(whole, **options)
    loop.checkpoints = Checkpoints(tmp_path, CheckpointOptions(4), {})
    loop.run()
    ((_, path),) = list_checkpoints(tmp_path / "checkpoints")
    later = FitTask({step: score for step, score in SCORES.items() if step > 4})
    again = trainer(later, read_checkpoint(path), **options)
    assert again.run().steps == 5 and again.best == loop.best
    assert later.measured == whole.measured[5:]
    assert torch.equal(later.loss.model.weight, whole.loss.model.weight)
