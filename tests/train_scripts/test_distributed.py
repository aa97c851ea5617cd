"""Two and four real CPU processes compared with one process at the same global batch size, for all scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_cases import (
    CASES,
    DREAMBOOTH,
    LAST,
    PROMPTS,
    RESUMED,
    SHARDED,
    STOPPED,
    Case,
    do_little,
    forget_accelerator,
    run_case,
)
from tests.tiny_pipelines import PIPELINES
from tests.training_helpers import (
    TINY_CONFIG,
    script,
    write_class_folders,
    write_tiny_clip,
    write_tiny_vit,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def without_figures() -> Iterator[None]:
    """Those of the runs in this process; those on two leave them out too."""
    for case in (*CASES, DREAMBOOTH):
        script(case.script)  # imports what draws
    with pytest.MonkeyPatch.context() as patch:
        do_little(patch)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data: 5 validation batches of size 2 or 3 of size 4, an odd number for two processes."""
    work = tmp_path_factory.mktemp("work")
    write_class_folders(work / "images", per_class=15)
    rows = [f"{path.relative_to(work)},a {path.parent.name}" for path in sorted((work / "images").rglob("*.png"))]
    (work / "captions.csv").write_text("\n".join(["path,caption", *rows]))
    write_tiny_clip(work / "clip")
    write_tiny_clip(work / "siglip", {**TINY_CONFIG, "init_logit_bias": -10.0, "init_logit_scale": 2.3})
    write_tiny_vit(work / "vit", 3)
    PIPELINES["sd3"]().save_pretrained(work / "sd3")
    return work


@pytest.fixture(scope="module")
def two(work: Path) -> Path:
    """The run folders of all cases on two processes."""
    output = work / "two"
    run_case(SHARDED, work, work / "one", 1)
    forget_accelerator()
    command = [sys.executable, str(ROOT / "tests" / "distributed_cases.py"), str(work), str(output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "find_unused_parameters" not in done.stderr.partition(LAST)[0] and LAST in done.stderr
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for speed in ("images_per_second", "memory_gb"):
            line.pop(speed, None)
    return lines


@pytest.mark.slow
def test_several_processes_are_one_at_the_same_global_batch(work: Path, two: Path) -> None:
    """One test, because test workers do not share the runs on two processes, which take a minute."""
    for case in CASES:
        check_case(case, work, two)
    check_resumed(two)
    check_resumed_on_one(work, two)
    check_sharded(work, two)
    check_writers(work)
    check_dreambooth(work, two)
    check_case(PROMPTS, work, two / "four")


def check_case(case: Case, work: Path, two: Path) -> None:
    one = work / "one"
    run_case(case, work, one, 1)
    forget_accelerator()
    check_same(case, one, two)


def check_same(case: Case, one: Path, two: Path) -> None:
    ours, theirs = (load_file(folder / case.name / "adapter.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys(), case.name
    for name, tensor in ours.items():
        where = f"{case.name}, {name}"
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text: f"{where}: {text}")  # noqa: B023
    before, after = metrics(one / case.name), metrics(two / case.name)
    assert [line.pop("split") for line in after] == [line.pop("split") for line in before], case.name
    for expected, actual in zip(before, after, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6), case.name
    assert all(line["grad_norm"] > 1e-3 for line in before if "grad_norm" in line), case.name


def check_resumed(two: Path) -> None:
    """A resumed pair ends with the same bytes."""
    whole, resumed = two / "whole" / RESUMED.name, two / "resumed" / RESUMED.name
    assert (resumed / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert metrics(resumed) == metrics(whole)


def check_resumed_on_one(work: Path, two: Path) -> None:
    """What two processes have begun, one goes on with to the result of one alone."""
    assert [path.name for path in (two / STOPPED.name / "checkpoints").iterdir()] == ["step-000002"]
    for folder, more in ((two, ["--resume", "latest"]), (work / "one", [])):
        run_case(STOPPED, work, folder, 1, *more)
    resumed, whole = (load_file(folder / STOPPED.name / "adapter.safetensors") for folder in (two, work / "one"))
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-6)


def check_sharded(work: Path, two: Path) -> None:
    """FSDP ends as one process does, resumed or not, and one process goes on with what it has begun."""
    for version in ("fsdp1", "fsdp2"):
        whole, resumed = (two / version / name for name in ("whole", "resumed"))
        for folder in (whole, resumed):
            check_same(SHARDED, work / "one", folder)
        if version == "fsdp2":  # resumed from its own checkpoint; the other from that of one process
            one, other = (folder / SHARDED.name / "adapter.safetensors" for folder in (whole, resumed))
            assert one.read_bytes() == other.read_bytes()
        run_case(SHARDED, work, whole, 1, "--resume", "latest")
        check_same(SHARDED, work / "one", whole)


def check_writers(work: Path) -> None:
    """Only the first process writes."""
    first, second = (json.loads((work / f"changes-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) > 100  # the check detects writes at all
    assert second == []


def check_dreambooth(work: Path, two: Path) -> None:
    check_case(DREAMBOOTH, work, two / "four")
    check_same(DREAMBOOTH, work / "one", two / "fsdp2")
    summary = json.loads((two / "four" / DREAMBOOTH.name / "summary.json").read_text())
    assert summary["reload_difference"] == 0 and summary["after"]["loss"] < summary["before"]["loss"]
    assert len(list((work / "class images").glob("*.png"))) == 3
