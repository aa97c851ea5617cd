from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import sys
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from randlora_vision.training.data.batches import ShuffledBatches
from randlora_vision.training.dreambooth.buckets import BucketBatches
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.checkpoints import (
    Checkpoint,
    Checkpoints,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.optimizer_state import State
from randlora_vision.training.harness.options import CheckpointOptions, RunOptions, Training
from randlora_vision.training.harness.seeding import seeded_items
from tests.kill_helpers import killed_at

SETTINGS = {"training": {"lr": 0.1, "workers": 0}, "run": {"output_dir": "a"}, "processes": 1}


class Noisy(Dataset):
    """Vectors with noise from all three sources of random numbers on every access."""

    def __init__(self) -> None:
        self.values = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
        self.read = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        self.read += 1
        return self.values[index] + torch.rand(3) + random.random() + np.random.rand()


class Fit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.calls = 0
        self.killed_at = -1

    def forward(self, batch: Tensor) -> Tensor:
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        self.calls += 1
        return (self.model(batch)[:, 0] - batch.sum(dim=1)).square().mean()


class FitTask:
    def __init__(self, batches: int, killed_at: int = -1, workers: int = 0) -> None:
        self.loss = Fit()
        self.loss.killed_at = killed_at
        self.data = Noisy()
        self.own_lr: dict[nn.Parameter, float] = {}
        self.batches: DataLoader[Any] = DataLoader(
            self.data, batch_sampler=ShuffledBatches(len(self.data), 4, batches, seed=3), num_workers=workers
        )

    def evaluate(self) -> dict[str, float]:
        torch.rand(7)  # must not affect any step
        return {"score": float(self.loss.model[0].weight.detach().sum())}

    def check_gradients(self) -> list[str]:
        return []

    def save(self) -> str:
        return "nowhere"


def train(
    task: FitTask, run: Path | None = None, resume: Checkpoint | None = None, every: int = 3, **options: Any
) -> tuple[list[Any], list[Tensor]]:
    """Return the log without the speed, and the trained parameters."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    settings = Training(
        **{"lr": 0.01, "steps": 12, "batch_size": 4, "log_every": 2, "eval_every": 4, "seed": 5, **options}
    )
    lines: list[Any] = []

    def log(step: int, split: str, values: Any) -> None:
        lines.append((step, split, {name: value for name, value in values.items() if name != "images_per_second"}))

    checkpoints = Checkpoints(run, CheckpointOptions(checkpoint_every=every), SETTINGS) if run else None
    Trainer(task, settings, make_accelerator(settings), log, checkpoints, resume).run()
    return lines, [p.detach().clone() for p in task.loss.parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(accumulation: int, workers: int, tmp_path: Path) -> None:
    batches, options = 12 * accumulation, {"gradient_accumulation_steps": accumulation}
    lines, parameters = train(FitTask(batches), **options)
    with pytest.raises(KeyboardInterrupt):
        train(FitTask(batches, killed_at=8 * accumulation), tmp_path, **options)
    checkpoint = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1][1])
    assert checkpoint.state.step == 6  # in the middle of a pass over the data
    task = FitTask(batches, workers=workers)
    again, resumed = train(task, resume=checkpoint, **options)
    assert again == [line for line in lines if line[0] > 6]
    assert all(torch.equal(one, other) for one, other in zip(parameters, resumed, strict=True))
    if not workers:
        assert task.data.read == 6 * 4 * accumulation  # what was consumed before is not read again


def test_augmentation_depends_on_seed_and_position_alone() -> None:
    def batches(seed: int, workers: int = 0) -> Tensor:
        return torch.cat(list(seeded_items(FitTask(6, workers=workers).batches, seed)))

    first = batches(1)
    assert torch.equal(first, batches(1)) and not torch.equal(first, batches(2))
    plain = torch.stack([Noisy().values[i] for batch in ShuffledBatches(10, 4, 6, seed=3) for i in batch])
    assert len((first - plain)[:, 0].unique()) == 24  # no draw is repeated


def test_a_loader_without_positions_is_left_alone() -> None:
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=None)
    assert seeded_items(loader, 0) is loader


def test_checkpoints_are_safetensors_and_json_and_pruned(tmp_path: Path) -> None:
    train(FitTask(12), tmp_path)
    folders = list_checkpoints(tmp_path / "checkpoints")
    assert [step for step, _ in folders] == [9, 12]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000009", "step-000012"]
    for _, folder in folders:
        assert {path.name for path in folder.iterdir()} == {"state.json", "tensors.safetensors"}
    names = set(read_checkpoint(folders[0][1]).state.tensors)
    assert {"parameters/model.0.weight", "optimizer/0"} <= names


def checkpoints(run: Path, limit: int = 2) -> Checkpoints:
    return Checkpoints(run, CheckpointOptions(1, limit), SETTINGS)


def state(step: int) -> State:
    return State(step, {"a": 1}, {"x": torch.tensor([step])})


def test_a_run_that_went_back_leaves_no_later_checkpoints(tmp_path: Path) -> None:
    for step in (2, 4, 6, 4):
        checkpoints(tmp_path, limit=3).write(state(step))
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [2, 4]


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(tmp_path, limit=1).write(state(1))

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("randlora_vision.training.harness.checkpoints.save_file", full)
    with pytest.raises(OSError):
        checkpoints(tmp_path, limit=1).write(state(2))
    monkeypatch.undo()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [1]
    checkpoints(tmp_path, limit=1).write(state(2))  # over the leftovers
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_only_one_process_writes(tmp_path: Path) -> None:
    Checkpoints(tmp_path, CheckpointOptions(1), SETTINGS, writing=False).write(state(1))
    assert not list(tmp_path.iterdir())


def found(resume: str, **run: Any) -> tuple[Checkpoint | None, RunOptions]:
    return find_checkpoint(CheckpointOptions(resume=resume), RunOptions(**run))


def test_latest_and_a_path_find_their_checkpoint_and_folder(tmp_path: Path) -> None:
    for step in (8, 10):
        checkpoints(tmp_path).write(state(step))
    latest, run = found("latest", output_dir=str(tmp_path))
    assert latest is not None and latest.state.step == 10 and run.output_dir == str(tmp_path)
    older, run = found(str(tmp_path / "checkpoints" / "step-000008"))
    assert older is not None and older.state.tensors["x"].item() == 8 and run.output_dir == str(tmp_path)
    assert find_checkpoint(CheckpointOptions(), RunOptions()) == (None, RunOptions())


@pytest.mark.parametrize(
    ("resume", "run", "expected"),
    [
        ("latest", {}, "--resume latest needs --output-dir"),
        ("{tmp}/checkpoints/step-000009", {}, "there is no checkpoint"),
        ("{tmp}/checkpoints/step-000001", {"output_dir": "{tmp}/other"}, "--output-dir is .*other: omit --output-dir"),
        ("{tmp}/checkpoints/step-000001", {"overwrite": True}, "--overwrite would remove"),
    ],
)
def test_what_cannot_be_resumed_is_an_error(resume: str, run: Any, expected: str, tmp_path: Path) -> None:
    checkpoints(tmp_path).write(state(1))
    run = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in run.items()}
    with pytest.raises(ValueError, match=expected):
        found(resume.format(tmp=tmp_path), **run)


def spoil_json(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 3, ')


def spoil_keys(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 3}')


def spoil_format(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 7}')


def spoil_tensors(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)


def remove_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


def cut_tensors(folder: Path) -> None:
    os.truncate(folder / "tensors.safetensors", 20)


def empty_state(folder: Path) -> None:
    os.truncate(folder / "state.json", 0)


@pytest.mark.parametrize(
    "spoil", [spoil_json, spoil_keys, spoil_format, spoil_tensors, remove_tensors, cut_tensors, empty_state]
)
def test_a_damaged_checkpoint_is_an_error(spoil: Any, tmp_path: Path) -> None:
    checkpoints(tmp_path).write(state(1))
    spoil(tmp_path / "checkpoints" / "step-000001")
    what = "was written by another version of .*format" if spoil is spoil_format else "is damaged"
    with pytest.raises(ValueError, match=f"the checkpoint .*step-000001 {what}.*remove .*checkpoints to start"):
        found("latest", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"the checkpoint .*step-000001 {what}"):
        found(str(tmp_path / "checkpoints" / "step-000001"))


def remove_everything(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("spoil", [spoil_tensors, remove_tensors, remove_everything, shutil.rmtree])
def test_the_latest_is_the_newest_whole_one(spoil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        checkpoints(tmp_path, limit=3).write(state(step))
    (tmp_path / "checkpoints" / "step-000004 copy").mkdir()
    spoil(tmp_path / "checkpoints" / "step-000003")
    latest, _ = found("latest", output_dir=str(tmp_path))
    assert latest is not None and latest.state.step == 2
    printed = capsys.readouterr().out
    assert ("step-000003 is damaged" in printed and "an earlier one is used" in printed) or spoil is shutil.rmtree


def test_without_a_checkpoint_the_latest_is_a_new_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found("latest", output_dir=str(tmp_path / "none")) == (None, RunOptions(output_dir=str(tmp_path / "none")))
    assert "none holds no checkpoint, so the run starts anew" in capsys.readouterr().out


def test_a_kill_while_pruning_leaves_no_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoints(tmp_path, limit=2).write(state(step))

    def killed(folder: Path, **_: Any) -> None:
        (folder / "state.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(tmp_path, limit=1)._prune(1)  # a resumed run that went back removes the newest
    monkeypatch.undo()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [1]
    checkpoints(tmp_path)  # the next run clears the rest away
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize(("limit", "step"), [(1, 6), (2, 4)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(limit: int, step: int, tmp_path: Path) -> None:
    """New ones, and one that a run that went back writes again."""
    for earlier in (2, 4):
        checkpoints(tmp_path / "before", limit=limit).write(state(earlier))
    for number in itertools.count(1):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        ended = killed_at(number, lambda run=run: checkpoints(run, limit=limit).write(state(step)))  # type: ignore[misc]
        latest, _ = found("latest", output_dir=str(run))
        assert latest is not None and latest.state.step in ((4, step) if step > 4 else (2, 4))
        checkpoints(run, limit=limit).write(state(step))
        kept = sorted({2, 4, step})[-limit:]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n:06}" for n in kept]
        if ended:
            break
    assert number > 12


def test_moved_images_may_be_read_from_another_place(tmp_path: Path) -> None:
    then = {"data": {"data": "a", "shots": 3}, "images and split": "hash of a", "images": "hash"}
    now = {**then, "data": {"data": "b", "shots": 3}, "images and split": "hash of b"}
    Checkpoints(tmp_path, CheckpointOptions(), then).write(state(4))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000004")
    (note,) = checkpoint.check(now, [], "", ["data.data"])
    assert note == "--data was 'a', is now 'b': the same images in another place"
    for others in ({**now, "images": "other hash"}, {**now, "data": {"data": "b", "shots": 4}}):
        with pytest.raises(ValueError, match="cannot resume .* with other settings"):
            checkpoint.check(others, [], "", ["data.data"])
    del checkpoint.settings["images"]  # as an older version wrote it
    assert checkpoint.check({**then, "images": "hash"}, [], "", ["data.data"]) == []


def test_a_checkpoint_of_another_version_goes_on_where_new_options_have_their_defaults(tmp_path: Path) -> None:
    """The other version had an option that is gone, which was off, and lacked two that are new."""
    then = {"training": {"lr": 0.1, "scale_lr": False, "extra": []}, "images": "hash"}
    Checkpoints(tmp_path, CheckpointOptions(), then).write(state(4))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000004")
    defaults = {"training": {"lr": 0.2, "cycles": 1, "optimizer_kwargs": ()}}
    now = {"training": {"lr": 0.1, "cycles": 1, "optimizer_kwargs": []}, "images": "hash"}
    assert checkpoint.check(now, [], defaults=defaults) == []
    for name, value in (("cycles", 2), ("lr", 0.2)):
        with pytest.raises(ValueError, match=f"--{name} was .*, is now {value}"):
            checkpoint.check({**now, "training": {**now["training"], name: value}}, [], defaults=defaults)
    checkpoint.settings["training"]["scale_lr"] = True
    with pytest.raises(ValueError, match="--scale-lr was True, is now None"):
        checkpoint.check(now, [], defaults=defaults)


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    checkpoints(tmp_path).write(state(1))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000001")
    free = ("run", "training.workers")
    changed = {**SETTINGS, "training": {"lr": 0.1, "workers": 4}, "run": {"output_dir": "b"}}
    assert checkpoint.check(changed, free) == []
    with pytest.raises(
        ValueError, match=r"other settings: --lr was 0.1, is now 0.2; processes was 1, is now 2 \("
    ) as no:
        checkpoint.check({"training": {"lr": 0.2, "workers": 0}, "run": {"report_to": ""}, "processes": 2}, free)
    assert "(1 image in a step, now 2); these may change: --report-to, --workers, and --batch-size" in str(no.value)


def test_a_step_of_the_same_images_may_be_divided_in_another_way(tmp_path: Path) -> None:
    def settings(batch: int, accumulation: int, processes: int) -> dict[str, Any]:
        training = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
        return {"training": training, "processes": processes}

    Checkpoints(tmp_path, CheckpointOptions(1), settings(8, 2, 1)).write(state(1))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000001")
    assert checkpoint.check(settings(8, 2, 1), ()) == []
    for other in (settings(8, 1, 2), settings(4, 1, 4), settings(16, 1, 1)):
        (note,) = checkpoint.check(other, ())
        assert "the steps have the same images as before" in note
    with pytest.raises(ValueError, match=r"processes was 1, is now 2 \(16 images in a step, now 32\)"):
        checkpoint.check(settings(8, 2, 2), ())
    with pytest.raises(ValueError, match=r"processes was 1, is now 2 \(the images have several sizes"):
        checkpoint.check(settings(8, 1, 2), (), "the images have several sizes")


@pytest.mark.parametrize("buckets", [[(8, 8)] * 7, [(8, 8)] * 4 + [(8, 16)] * 3])
@pytest.mark.parametrize("priors", [0, 3])
def test_batches_know_whether_they_can_be_divided(buckets: list[tuple[int, int]], priors: int) -> None:
    def steps(size: int, batches: int) -> list[list[int]]:
        sampler = BucketBatches([*buckets, *buckets[:priors], *buckets[4:]], prior, size, batches, seed=1)
        assert sampler.divisible == (len(set(buckets)) == 1)
        order = list(sampler)
        return [sorted(sum(order[i : i + 4 // size], [])) for i in range(0, batches, 4 // size)]

    prior = [False] * 7 + [True] * (priors + 3) if priors else [False] * 10
    assert (steps(4, 6) == steps(2, 12) == steps(1, 24)) == (len(set(buckets)) == 1)


def test_a_run_goes_on_for_more_steps_but_not_for_fewer_than_it_did(tmp_path: Path) -> None:
    Checkpoints(tmp_path, CheckpointOptions(1), {"training": {"steps": 8}}).write(state(6))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000006")
    (note,) = checkpoint.check({"training": {"steps": 12}}, ["training.steps"])
    assert "--steps was 8, is now 12" in note
    with pytest.raises(ValueError, match="is after step 6: give --steps 6 or more"):
        checkpoint.check({"training": {"steps": 5}}, ["training.steps"])


def test_more_steps_follow_the_new_schedule(tmp_path: Path) -> None:
    train(FitTask(6), tmp_path, steps=6, schedule="linear", log_every=1, warmup_fraction=0.0)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000006")
    lines, _ = train(FitTask(12), resume=checkpoint, schedule="linear", log_every=1, warmup_fraction=0.0)
    rates = [values["lr"] for _, split, values in lines if split == "train"]
    assert rates == pytest.approx([0.01 * (1 - step / 12) for step in range(6, 12)])


def test_a_constant_rate_makes_more_steps_the_longer_run(tmp_path: Path) -> None:
    constant = {"schedule": "constant", "warmup_fraction": 0.0}
    _, straight = train(FitTask(12), **constant)
    train(FitTask(6), tmp_path, steps=6, **constant)
    _, resumed = train(FitTask(12), resume=read_checkpoint(tmp_path / "checkpoints" / "step-000006"), **constant)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    """The limit on the size of files is real: safetensors reports it as its own kind of error."""
    checkpoints(tmp_path, limit=1).write(state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*step-000002.*File too large"):
            checkpoints(tmp_path, limit=1).write(State(2, {}, {"x": torch.zeros(1000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    read_checkpoint(tmp_path / "checkpoints" / "step-000001")


class Small8Bit(torch.optim.Optimizer):
    """Keeps its state as 8-bit optimisers do: bytes with their scale, a table, and a step that is not a tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p]
                if not held:
                    held.update(step=0, state1=torch.zeros_like(p, dtype=torch.uint8), absmax1=torch.ones(()))
                    held["qmap1"] = torch.linspace(-1, 1, 256)
                moment = held["qmap1"][held["state1"].long()] * held["absmax1"] * 0.9 + 0.1 * p.grad
                held["absmax1"] = moment.abs().max() + 1e-12
                held["state1"] = ((moment / held["absmax1"] + 1) * 127.5).round().to(torch.uint8)
                held["step"] += 1
                p.sub_(group["lr"] * moment)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**126])  # the second overflows, so that the first steps are skipped
def test_half_precision_with_an_8_bit_optimiser_resumes(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from randlora_vision.training.harness import loop

    monkeypatch.setattr(loop, "make_optimizer", lambda name, parameters, *_: Small8Bit(parameters))
    make = make_accelerator

    def scaled(options: Any) -> Any:
        accelerator = make(options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return accelerator

    monkeypatch.setattr(sys.modules[__name__], "make_accelerator", scaled)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call|Seems like", UserWarning)
        lines, straight = train(FitTask(12), tmp_path, every=2)
        again, resumed = train(FitTask(12), resume=read_checkpoint(tmp_path / "checkpoints" / "step-000010"))
    assert again == [line for line in lines if line[0] > 10]
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    train(FitTask(12), tmp_path)
    _, path = list_checkpoints(tmp_path / "checkpoints")[-1]
    task = FitTask(12)
    task.loss.model.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not hold the parameters.*: 2 are missing .*parameters/model.3.bias"):
        train(task, resume=read_checkpoint(path))


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_checkpoint_of_the_format_before_is_read_and_checked(spoilt: bool, tmp_path: Path) -> None:
    """Format 2 holds a SHA-256."""
    checkpoints(tmp_path).write(state(1))
    path = tmp_path / "checkpoints" / "step-000001"
    data = (path / "tensors.safetensors").read_bytes()
    content = json.loads((path / "state.json").read_text())
    assert content.pop("crc32") == f"{zlib.crc32(data):08x}" and content.pop("format") == 3
    (path / "state.json").write_text(json.dumps({**content, "format": 2, "sha256": hashlib.sha256(data).hexdigest()}))
    if spoilt:
        spoil_tensors(path)
    with pytest.raises(ValueError, match="is not the file that was written") if spoilt else nullcontext():
        assert read_checkpoint(path).state.tensors["x"].item() == 1


CHANGES: dict[str, tuple[Any, str]] = {
    "values": (True, "values must be a JSON object, got true or false"),
    "step": ("1", "step must be an integer, got a string"),
    "settings": ([], "settings must be a JSON object, got a list"),
    "crc32": (5, "crc32 must be a string, got an integer"),
    "format": (None, "format must be an integer, got null"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_checkpoint_with_a_value_of_another_type(key: str, tmp_path: Path) -> None:
    value, message = CHANGES[key]
    checkpoints(tmp_path).write(state(1))
    path = tmp_path / "checkpoints" / "step-000001"
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=f"the checkpoint .*step-000001 is damaged: state.json: {message}"):
        read_checkpoint(path)


VALUES: tuple[tuple[list[Any], Any, str], ...] = (
    (["optimizer"], 3, "optimizer must be a JSON object, got an integer"),
    (["optimizer", "memory", "model.0.weight"], 3, r"memory\['model.0.weight'\] must be a JSON object, got an integer"),
    (["optimizer", "memory", "model.0.weight"], {"step": {"__tensor__": "none"}}, "there is no tensor 'none'"),
    (["optimizer", "groups"], [], "it has 0 groups, here are 2"),
    (["optimizer", "groups", 0], {"params": 3}, "params is not a number"),
    (["optimizer", "groups", 0, "lr"], "x", "lr is not a number"),
    (["best"], {"step": 1}, "best: it lacks value, evaluations_since"),
    (["recent"], [{"a": "b"}, 1], r"recent: \[0\]\['a'\] must be a number, got a string"),
    (["seconds"], None, "seconds must be a number, got null"),
)


def test_values_of_another_type_are_refused_by_name(tmp_path: Path) -> None:
    train(FitTask(12), tmp_path)
    good = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1][1])
    for (*way, last), value, message in VALUES:
        values = holder = json.loads(json.dumps(good.state.values))
        for key in way:
            holder = holder[key]
        holder[last] = value
        broken = Checkpoint(good.path, good.settings, State(good.state.step, values, good.state.tensors))
        with pytest.raises(ValueError, match=f"checkpoint of step 12.*{message}"):
            train(FitTask(12), resume=broken)


def test_metrics_of_another_kind_are_refused_by_line(tmp_path: Path) -> None:
    from randlora_vision.training.harness.run_folder import RunFolder

    run = RunFolder(tmp_path)
    for line, message in (
        ("[]", "line 2: the line must be a JSON object, got a list"),
        ("{", "line 2 is not valid JSON"),
        ('{"split": "train"}', "line 2: it lacks step"),
        ('{"step": "2", "split": "train"}', "line 2: step must be an integer, got a string"),
    ):
        run.metrics.write_text(f'{{"step": 1, "split": "train", "loss": 0.5}}\n{line}\n')
        for read in (run.read_metrics, lambda: run.keep_metrics(9)):
            with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
                read()


def test_settings_are_readable_in_the_file(tmp_path: Path) -> None:
    checkpoints(tmp_path).write(state(1))
    content = json.loads((tmp_path / "checkpoints" / "step-000001" / "state.json").read_text())
    assert content["settings"] == SETTINGS and content["step"] == 1
