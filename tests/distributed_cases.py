"""Training runs that must come out the same with one process and with two: also the program that runs them on two.

With arguments, WORK FOLDER, it forks two processes that run all cases: importing everything takes ten seconds, so it
is done once. The processes find one another by the variables that torchrun sets.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.training.dreambooth import task as dreambooth_task
from tests.kept_parsers import keep_parsers
from tests.training_helpers import draw_nothing, script

# Plain gradient descent: Adam's first steps turn rounding of a gradient near zero into steps of full size.
COMMON = [
    *["--eval-every", "2", "--log-every", "1", "--optimizer", "sgd", "--report-to", "none"],
    *["--warmup-fraction", "0"],
]
CLIP = ["--prompts", "average", "--templates", "a {}", "the {}", "--rank", "4"]
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Case:
    """One run: the script, its flags, how many batches a process accumulates, and the steps."""

    name: str
    script: str
    flags: tuple[str, ...]
    accumulation: int = 1
    steps: int = 2

    def argv(self, work: Path, output: Path, processes: int) -> list[str]:
        batch = GLOBAL_BATCH // processes // self.accumulation
        flags = [flag.replace("WORK", str(work)) for flag in self.flags]
        numbers = ["--batch-size", str(batch), "--gradient-accumulation-steps", str(self.accumulation)]
        numbers += ["--steps", str(self.steps)]
        numbers += ["--workers", "0"] * ("--workers" not in flags)  # each is a fork of this process
        return [*COMMON, *flags, *numbers, "--output-dir", str(output / self.name)]


def clip(name: str, *flags: str, model: str = "clip", accumulation: int = 1, steps: int = 2) -> Case:
    data = ("--data", "WORK/images", "--model", f"local-dir:WORK/{model}")
    return Case(name, "train_clip", (*data, *CLIP, *flags), accumulation, steps)


PROMPTS = clip("prompts-both", "--train-logit-scale", "--ema-decay", "0.5", "--lr", "0.02", accumulation=2)
CASES = [
    clip("clip-full", "--loss", "clip", "--method", "full", "--lr", "0.01"),
    clip("siglip", "--loss", "siglip", "--train-logit-scale", "--lr", "0.01", model="siglip", accumulation=2),
    clip(
        *("text-lora", "--data", "WORK/captions.csv", "--towers", "text", "--method", "lora", "--lr", "0.02"),
        accumulation=2,
    ),
    Case(
        "classifier",
        "train_classifier",
        ("--data", "WORK/images", "--model", "local-dir:WORK/vit", "--pretrained", "--rank", "4", "--lr", "0.02"),
    ),
]
RESUMED = clip(
    *("resumed", "--loss", "clip", "--dropout", "0.2", "--lr", "0.02", "--checkpoint-every", "2", "--workers", "1"),
    accumulation=2,
    steps=3,
)

SHARDED = clip("sharded", "--loss", "clip", "--ema-decay", "0.5", "--lr", "0.02", "--checkpoint-every", "2", steps=3)
"""Run whole, resumed and on other numbers of processes by FSDP."""

STOPPED = clip("stopped", "--loss", "clip", "--lr", "0.02", steps=3)


def do_little(patch: pytest.MonkeyPatch) -> None:
    """Draw nothing, and measure DreamBooth's loss, which every process does for itself, on few images."""
    draw_nothing(patch)
    patch.setattr(dreambooth_task, "_MEASURED", 2)


def forget_accelerator() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def run_case(case: Case, work: Path, output: Path, processes: int, *more: str) -> None:
    forget_accelerator()
    script(case.script).main([*case.argv(work, output, processes), *more])


def check_stopped(work: Path, output: Path) -> None:
    """A signal to the second process alone stops both after the same step, with one checkpoint and one message."""
    from torch import distributed

    from randlora_vision.training.clip.contrastive import ContrastiveLoss

    forward, calls = ContrastiveLoss.forward, iter(range(100))

    def interrupted(self: ContrastiveLoss, batch: Any) -> Any:
        if next(calls) == 1 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
        patch.setattr(ContrastiveLoss, "forward", interrupted)
        run_case(STOPPED, work, output, 2)
    assert ended.value.code == 143
    message = "stopped by SIGTERM after step 2 of 3: "
    assert (message in error.getvalue()) == (distributed.get_rank() == 0), error.getvalue()


@contextlib.contextmanager
def by_fsdp(version: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", version)
        yield


def run_sharded(version: str, work: Path, output: Path) -> None:
    """Run by FSDP; go on from its own checkpoint, or from that of a single process."""
    with by_fsdp(version):
        run_case(SHARDED, work, output / "whole", 2)
        copy_checkpoint(SHARDED, work / "one" if version == "1" else output / "whole", output / "resumed")
        run_case(SHARDED, work, output / "resumed", 2, "--resume", "latest")


def copy_checkpoint(case: Case, source: Path, to: Path) -> None:
    """Copy what a run needs to go on from its checkpoint."""
    from torch import distributed

    distributed.barrier()
    if distributed.get_rank() == 0:
        for name in ("checkpoints", "metrics.jsonl"):
            copy = shutil.copytree if name == "checkpoints" else shutil.copy
            (to / case.name).mkdir(parents=True, exist_ok=True)
            copy(source / case.name / name, to / case.name / name)
    distributed.barrier()


def check_parts_of_unequal_size() -> None:
    """Compare the losses' values and gradients, 3 pairs here and 4 there, with those of all 7; and measuring."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader

    from randlora_vision.training.clip.contrastive import ContrastiveLoss
    from randlora_vision.training.harness.distributed import measure_all
    from tests.training.clip.test_contrastive import CONTRASTS, REPEATED, Towers, cut, gradients, plain_loss

    own = cut(REPEATED, 0, 3) if distributed.get_rank() == 0 else cut(REPEATED, 3, None)
    for contrast in CONTRASTS:
        model = Towers()
        assert model.logit_bias is not None
        model.logit_bias.requires_grad_(contrast == "siglip")
        loss = ContrastiveLoss(model, contrast)
        expected = plain_loss(contrast, model, *loss.features(REPEATED), REPEATED["captions"])
        wanted = gradients(model, expected)
        parallel = DistributedDataParallel(loss)
        actual = parallel(own)
        actual.backward()
        value = actual.detach().clone()
        distributed.all_reduce(value)
        torch.testing.assert_close(value / 2, expected)
        torch.testing.assert_close({name: model.get_parameter(name).grad for name in wanted}, wanted)
    for size in (1, 3, 4, 5):
        numbers = torch.arange(2 * size - 1)
        (seen,) = measure_all(DataLoader(numbers, batch_size=2), lambda batch: (batch,))  # type: ignore[arg-type]
        (streamed,) = measure_all(iter(numbers.split(2)), lambda batch: (batch,))
        assert seen.tolist() == streamed.tolist() == numbers.tolist()


DREAMBOOTH = Case(
    "dreambooth",
    "train_dreambooth",
    (
        *("--pretrained-model-name-or-path", "WORK/sd3", "--instance-data-dir", "WORK/images/one"),
        *("--instance-prompt", "a photo of sks digit", "--class-prompt", "a photo of a digit"),
        *("--with-prior-preservation", "--class-data-dir", "WORK/class images", "--num-class-images", "3"),
        *("--train-text-encoder", "--max-sequence-length", "16", "--resolution", "16", "--num-inference-steps", "2"),
        *("--rank", "4", "--lr", "0.1", "--schedule", "constant", "--caption-dropout-rate", "0.3"),
    ),
)
"""SD3 has adapters that get no gradient, and prior preservation makes batches twice as long."""
FOUR = [PROMPTS, DREAMBOOTH]
"""Run on four processes, which do all that two do."""
LAST = "the other cases have ended"
"""Printed before DreamBooth, which has parameters without a gradient on some models only, of which PyTorch warns."""


def join(rank: int, processes: int, port: int) -> None:
    """Be one of so many processes, and stay it from run to run."""
    counts = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **counts}
    os.environ.update({name: str(value) for name, value in where.items()})
    from torch import distributed

    distributed.destroy_process_group = lambda *_: None  # at the end of each run
    do_little(pytest.MonkeyPatch())


def four(rank: int, port: int, work: Path, output: Path) -> None:
    """Run a case that measures by splits and the one that draws pictures as one of four processes."""
    join(rank, 4, port)
    for case in FOUR:
        run_case(case, work, output / "four", 4)


def main(rank: int, port: int, work: Path, output: Path) -> None:
    """Run every case as one of two processes; note what this process changed on disk."""
    join(rank, 2, port)
    from torch import distributed

    from tests.sharded_cases import check_sharded_models

    changes: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        changing = event.partition(".")[0] in ("os", "shutil") and event != "os.listdir" and event != "os.scandir"
        if (writing or changing) and any(str(argument).startswith(str(output)) for argument in arguments):
            changes.append(f"{event} {arguments}")

    sys.addaudithook(note)
    for case in CASES:
        run_case(case, work, output, 2)
    check_parts_of_unequal_size()
    check_sharded_models()
    check_stopped(work, output)
    run_case(RESUMED, work, output / "whole", 2)
    copy_checkpoint(RESUMED, output / "whole", output / "resumed")
    run_case(RESUMED, work, output / "resumed", 2, "--resume", "latest")
    for version in ("1", "2"):
        run_sharded(version, work, output / f"fsdp{version}")
    distributed.barrier()
    print(LAST, file=sys.stderr, flush=True)
    with by_fsdp("2"):
        run_case(DREAMBOOTH, work, output / "fsdp2", 2)
    (work / f"changes-{rank}.json").write_text(json.dumps(changes))
    assert distributed.get_world_size() == 2


if __name__ == "__main__":
    import datasets  # noqa: F401, accelerate imports it for each data loader
    from diffusers import StableDiffusion3Pipeline  # noqa: F401
    from torch.multiprocessing import start_processes

    keep_parsers()
    for name in ("train_clip", "train_classifier", "train_dreambooth"):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            script(name).main(["--nothing"])  # makes the parser, for all processes
    gc.collect()
    gc.freeze()  # every run collects garbage
    for program, processes in ((main, 2), (four, 4)):
        with socket.create_server(("127.0.0.1", 0)) as free:
            chosen = free.getsockname()[1]
        start_processes(program, (chosen, Path(sys.argv[1]), Path(sys.argv[2])), nprocs=processes, start_method="fork")
