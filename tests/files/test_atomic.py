"""Atomic writes: unique temporary names, ordinary permissions, and one error that names the path."""

from __future__ import annotations

import itertools
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter
from randlora_vision.files.atomic import remove_unfinished, replacing, replacing_folder, write_json
from randlora_vision.integrations import peft
from randlora_vision.integrations.export.lora import export_lora
from randlora_vision.integrations.timm import save_merged
from randlora_vision.training.harness.checkpoints import Checkpoints, State, list_checkpoints, read_checkpoint
from randlora_vision.training.harness.options import CheckpointOptions
from tests.helpers import mlp, randomize
from tests.kill_helpers import killed_at

CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"], bases="uniform")  # which PEFT can express
TENSORS = {"a": torch.arange(4096.0)}


def adapted() -> torch.nn.Module:
    model = mlp()
    inject(model, CONFIG)
    randomize(model)
    return model


def checkpoint(folder: Path) -> None:
    Checkpoints(folder, CheckpointOptions(1, 3), {}).write(State(1, {}, TENSORS))


WRITERS: dict[str, Callable[[Path], object]] = {
    "adapter": lambda folder: save_adapter(adapted(), folder / "adapter.safetensors"),
    "peft": lambda folder: peft.export(adapted(), folder / "peft"),
    "lora": lambda folder: export_lora(adapted(), folder / "lora", rank=2, format="peft"),
    "merged": lambda folder: save_merged(adapted(), folder / "merged.safetensors"),
    "checkpoint": checkpoint,
    "json": lambda folder: write_json(folder / "x.json", [0] * 4096),
}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077], indirect=True)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_has_ordinary_permissions(tmp_path: Path, writer: str, umask: int) -> None:
    folder = tmp_path / "made" / "on the way"
    WRITERS[writer](folder)
    written = [path for path in folder.parent.rglob("*") if path != folder]
    assert any(path.is_file() for path in written)
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    """As with `open`: who may read a private adapter does not change by saving it again."""
    path = save_adapter(adapted(), tmp_path / "adapter.safetensors")
    for mode in (0o600, 0o640, 0o664):
        path.chmod(mode)
        save_adapter(adapted(), path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def together(work: Callable[[int], object], count: int = 8, times: int = 5) -> None:
    """Call `work` from several threads at once, and raise the first error of any of them."""
    barrier, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(times):
                work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_save_to_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    model, path = adapted(), tmp_path / "adapter.safetensors"
    together(lambda _: save_adapter(model, path))
    fresh = mlp()
    load_adapter(fresh, path)
    x = torch.ones(2, 8)
    assert torch.equal(fresh(x), model(x)) and os.listdir(tmp_path) == [path.name]


def test_threads_that_write_one_checkpoint_leave_one_whole_folder(tmp_path: Path) -> None:
    writers = [Checkpoints(tmp_path, CheckpointOptions(1, 3), {}) for _ in range(8)]
    together(lambda number: writers[number].write(State(1, {"by": number}, TENSORS)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0][1]).state.values["by"] in range(8)


def test_long_and_odd_names(tmp_path: Path) -> None:
    for name in ("é" * 118 + ".safetensors", "a" * 240 + ".json", ".hidden", "no suffix", "a b\n.json"):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"


def test_a_folder_that_is_not_empty_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_text("x")
    with pytest.raises(OSError, match="cannot write .*/a: "), replacing_folder(tmp_path / "a") as unfinished:
        (unfinished / "new").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1 KiB: Python's writers fail with an OSError, safetensors' with its own error.

    Not a fixture: pytest reports between the parts of a test, perhaps into a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["adapter", "peft", "lora", "merged", "checkpoint", "json"])
def test_a_full_disk_is_one_line_that_names_the_path(tmp_path: Path, writer: str) -> None:
    with full_disk(), pytest.raises(OSError, match="cannot write .*(too large|safetensors)") as caught:
        WRITERS[writer](tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and ".." not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_library_that_writes_beside_the_file(tmp_path: Path) -> None:
    """safetensors renames a file of its own, with permissions for the owner alone."""
    path = tmp_path / "x.safetensors"
    with replacing(path) as temporary:
        safetensors.torch.save_file(TENSORS, temporary)
    assert os.listdir(tmp_path) == [path.name]
    assert torch.equal(safetensors.torch.load_file(path)["a"], TENSORS["a"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, other = tmp_path / "x.json", tmp_path / ".x.notes.json"
    other.write_text("of somebody else")
    left = 0
    for number in itertools.count(1):
        write_json(path, "old")
        ended = killed_at(number, lambda: write_json(path, "new"))
        assert json.loads(path.read_text()) in (("old", "new") if not ended else ("new",))
        left += len(list(tmp_path.iterdir())) - 2
        remove_unfinished(path)
        assert {*tmp_path.iterdir()} == {path, other}
        if ended:
            break
    assert number > 4 and left > 0
