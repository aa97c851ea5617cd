"""The time of a training step of every method, divided by that of PEFT's LoRA: eager and compiled, beside its FLOPs.

python -m benchmarks.clock
python -m benchmarks.clock --modes compiled --workloads vit_s --sizes 1 16

A step is a forward and a backward pass of a model cut to a few blocks. The methods take turns; a figure is the median,
over the rounds, of the ratio to LoRA's step in the same round, with its 95% interval. On a CPU, the time is that of the
process on one thread, so that other processes disturb it little. The adapters have (nearly) the same number of trained
numbers, except for VeRA, whose rank is PEFT's default.
"""

import dataclasses
import itertools
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import command_line, measure
from benchmarks.methods import EVERY, METHODS
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Row
from randlora_vision.files.atomic import write_text

REFERENCE = "peft_lora"
MODES = ("FLOPs", "eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and its 95% interval."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(own: Sequence[float], other: Sequence[float]) -> "Ratio":
        """Compare two methods round by round; the interval is between two of the ordered ratios."""
        ratios = sorted(mine / theirs for mine, theirs in zip(own, other, strict=True))
        rounds = len(ratios)
        outside = max(0, math.floor((rounds - 1.96 * math.sqrt(rounds)) / 2) - 1)
        return Ratio(median(ratios), ratios[outside], ratios[-1 - outside], rounds)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        methods: Names in `EVERY`.
        blocks: Number of blocks that the model is cut to.
        budget: Seconds of timed rounds of a row.
        device: Where the steps run.
    """

    methods: Sequence[str]
    blocks: int
    budget: float
    device: torch.device


def prepared(row: Row, mode: str, setting: Setting) -> dict[str, measure.Trainee]:
    """Return the methods' models, with that of `REFERENCE` first."""
    torch.manual_seed(0)
    base: Any = WORKLOADS[row.workload].build()
    base.blocks = base.blocks[: setting.blocks]
    trainees = {}
    for name in dict.fromkeys((REFERENCE, *setting.methods)):
        trainee, _ = measure.prepare(row, base, name, setting.device, torch.float32)
        if mode == "compiled":
            trainee.model.compile()
        trainees[name] = trainee
    return trainees


def compared(row: Row, mode: str, setting: Setting) -> dict[str, Ratio]:
    """Return the ratios of the methods' step times to that of `REFERENCE`."""
    trainees = prepared(row, mode, setting)
    taken = seconds(trainees, setting.budget)
    if mode == "compiled":
        torch._dynamo.reset()
    return {name: Ratio.of(times, taken[REFERENCE]) for name, times in taken.items()}


def seconds(trainees: dict[str, measure.Trainee], budget: float) -> dict[str, list[float]]:
    """Time the methods' steps in turn until the budget is spent, at least 5 rounds, after one that does not count."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in trainees}
    names, end = list(trainees), math.inf
    for turn in itertools.count(-1):
        if turn == 0:
            end = time.perf_counter() + budget
        if turn >= 5 and time.perf_counter() > end:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            trainee = trainees[name]
            before = clock()
            trainee.forward().backward()
            if on_gpu:
                torch.cuda.synchronize()
            taken[name] += [clock() - before] if turn >= 0 else []
            trainee.optimizer.zero_grad(set_to_none=True)
    return taken


def lines(rows: Sequence[Row], modes: Sequence[str], setting: Setting) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for row, mode in itertools.product(rows, modes):
        title = f"{row.title.removesuffix(f', {row.which}')}, {mode}"
        if mode == "FLOPs":
            uncomputed = prepared(row, mode, dataclasses.replace(setting, device=torch.device("meta")))
            flops = {name: measure.flops(trainee) for name, trainee in uncomputed.items()}
            yield [
                title,
                *(f"{flops[name] / flops[REFERENCE]:.2f}" for name in setting.methods),
                str(setting.blocks),
                "",
            ]
            continue
        found = compared(row, mode, setting)
        counts = [str(setting.blocks), str(found[REFERENCE].rounds)]
        yield [title, *(str(found[name]) for name in setting.methods), *counts]


def profiled(row: Row, mode: str, setting: Setting, rounds: int = 20) -> Iterator[list[str]]:
    """Yield the rows of the table of operators: their time over that of all of `REFERENCE`'s, and their number."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, trainee in prepared(row, mode, setting).items():
        trainee.forward().backward()  # what is made once does not count
        with torch.profiler.profile() as profiler:
            for _ in range(rounds):
                trainee.forward().backward()
                trainee.optimizer.zero_grad(set_to_none=True)
        events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
        time_of = "self_device_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
        own = {event.key.removeprefix("aten::"): (getattr(event, time_of), event.count) for event in events}
        together = tuple(sum(figures) for figures in zip(*own.values(), strict=True))
        found[name] = {"all": together, **own}
    whole, _ = found[REFERENCE]["all"]
    most = {key: max(own.get(key, (0, 0))[0] for own in found.values()) for own in found.values() for key in own}
    for operator in sorted(most, key=lambda key: -most[key])[:20]:
        pairs = [own.get(operator, (0.0, 0.0)) for own in found.values()]
        yield [operator, *(f"{spent / whole:.3f} ({count / rounds:.0f})" for spent, count in pairs)]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and print and write the table."""
    parser = command_line.parser("clock", __doc__)
    parser.add_argument(
        "--workloads", nargs="+", choices=("vit_s", "vit_s_few", "vit_b"), default=["vit_s_few", "vit_s"]
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16, 64], help="numbers of images")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what is compared")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(EVERY), default=[*METHODS, "peft_vera"], help="beside PEFT's LoRA"
    )
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model")
    parser.add_argument("--seconds", type=float, default=30.0, help="timed rounds of a row take about this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where steps run")
    parser.add_argument("--profile", action="store_true", help="instead: the time of each operator of PyTorch")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    methods = [name for name in options.methods if name != REFERENCE]
    rows = [Row(name, size, "attention+mlp") for name, size in itertools.product(options.workloads, options.sizes)]
    setting = Setting(methods, options.blocks, options.seconds, device)
    if options.profile:
        _profile(rows, options.modes, setting, options.output)
        return
    columns = ["images", *(EVERY[name].title for name in methods), "blocks", "rounds"]
    head = f"Time of a step over that of PEFT's LoRA: median (95% interval). {where(setting)}\n\n{table([columns])}"
    found = _earlier(options.output, head) if options.output else {}
    for line in tqdm(lines(rows, options.modes, setting), total=len(rows) * len(options.modes), unit="row"):
        found[line[0]] = line
        tqdm.write(" | ".join(line))
        if options.output:  # after every row, so that an interrupted run keeps its results
            write_text(options.output, head + table([columns, *found.values()]).removeprefix(table([columns])))


def _earlier(path: Path, head: str) -> dict[str, list[str]]:
    """The rows that earlier runs with this head have written, by title: a run replaces its own rows alone."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = [line[2:-2].split(" | ") for line in text.removeprefix(head).splitlines()] if text.startswith(head) else []
    return {row[0]: row for row in rows}


def _profile(rows: Sequence[Row], modes: Sequence[str], setting: Setting, output: Path | None) -> None:
    text = f"Operators of a step: share of the time of PEFT LoRA's operators (number). {where(setting)}\n"
    titles = [EVERY[name].title for name in (REFERENCE, *setting.methods)]
    for row, mode in itertools.product(rows, [mode for mode in modes if mode != "FLOPs"]):
        text += f"\n{row.title}, {mode}\n\n{table([['operator', *titles], *profiled(row, mode, setting)])}"
    print(text)
    if output:
        write_text(output, text)


def where(setting: Setting) -> str:
    """Return what is measured, on which device and with which libraries."""
    on_gpu = setting.device.type == "cuda"
    name = torch.cuda.get_device_name(setting.device) if on_gpu else f"a CPU ({platform.machine()}), one thread"
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "peft", "timm"))
    return f"Attention and MLP, rank 32, on {name}; {libraries}."


if __name__ == "__main__":
    main()
