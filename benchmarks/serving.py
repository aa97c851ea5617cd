"""Many adapters over one base: a batch of several, switching among them, and the memory of each.

python -m benchmarks.serving
python -m benchmarks.serving --samples 0 --adapters 10 100 1000 --output benchmarks/results/serving.md

A batch of images is classified with 1 to S different adapters in it: ours by `per_sample`, PEFT's LoRA by the
`adapter_names` of its forward. FLOPs and device operations are counted, times are medians of ratios to PEFT within one
run. Adapters have (nearly) as many trained numbers in both.
"""

import gc
import math
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import command_line
from benchmarks.measure import timed
from benchmarks.methods import lora_rank, peft_model, randlora_numbers
from benchmarks.operations import Operations, python_calls
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Layer
from randlora_vision import RandLoRAConfig, inject, per_sample, set_active
from randlora_vision.files.atomic import write_text

_RANK = 32
PEFT = "PEFT LoRA"
KINDS = {"ours, dense bases": "uniform", "ours, structured bases": "structured"}


class Served(NamedTuple):
    """A model with several adapters.

    Attributes:
        model: The model.
        mixed: Names of adapters -> a context and the keyword arguments of a call with an adapter per sample.
        switch: Makes one adapter the active one.
        seconds: CPU time of adding each adapter.
    """

    model: nn.Module
    mixed: Callable[[list[str]], tuple[Any, dict[str, Any]]]
    switch: Callable[[str], None]
    seconds: list[float]


def served(method: str, model: nn.Module, targets: list[str], names: list[str], limit: float = math.inf) -> Served:
    """Add adapters to a model, as many as take `limit` seconds, and at least two."""
    model.requires_grad_(False)
    if method != PEFT:

        def add(name: str) -> None:
            inject(model, RandLoRAConfig(rank=_RANK, target_modules=targets, bases=KINDS[method]), name)

        seconds = _added(add, names, limit)
        model.eval()
        return Served(
            model, lambda chosen: (per_sample(model, chosen), {}), lambda name: set_active(model, name), seconds
        )
    from peft import LoraConfig

    rank = lora_rank(model, targets, randlora_numbers(model, targets, _RANK))
    config = LoraConfig(r=rank, target_modules=targets)
    adapted: Any = peft_model(model, config, names[0])
    seconds = _added(lambda name: adapted.add_adapter(name, config), names[1:], limit)
    adapted.eval()
    return Served(
        adapted, lambda chosen: (nullcontext(), {"adapter_names": chosen}), adapted.set_adapter, seconds[:1] + seconds
    )


def _added(add: Callable[[str], object], names: list[str], limit: float) -> list[float]:
    """The CPU seconds of adding each adapter."""
    seconds: list[float] = []
    end = time.monotonic() + limit
    for name in names:
        if len(seconds) > 1 and time.monotonic() > end:
            break
        before = time.process_time()
        add(name)
        seconds.append(time.process_time() - before)
    return seconds


@torch.no_grad()
def mixed_batch(one: Served, chosen: list[str], x: Tensor) -> Tensor:
    """Return the output of a batch whose samples have these adapters."""
    context, arguments = one.mixed(chosen)
    with context:
        return one.model(x, **arguments)


def batches(samples: int, rounds: int) -> Iterator[list[str]]:
    """Yield the rows of the table of mixed batches."""
    workload = WORKLOADS["vit_s"]
    x = workload.inputs(samples, torch.device("cpu"))["x"]
    names = [f"a{i}" for i in range(samples)]
    models = {}
    for method in (PEFT, *KINDS):
        model = workload.build()
        models[method] = served(method, model, workload.targets(model, "attention+mlp"), names)
    yield ["method", "adapters in the batch", "FLOPs", "operations", "time"]
    for different in (1, samples // 2, samples):
        chosen = [names[i % different] for i in range(samples)]
        seconds: dict[str, list[float]] = {method: [] for method in models}
        for turn in range(rounds + 1):
            for method, one in models.items():
                took = timed(partial(mixed_batch, one, chosen, x), {"x": x})
                seconds[method] += [took] if turn else []
        reference: tuple[int, int] | None = None
        for method, one in models.items():
            with FlopCounterMode(display=False) as flops:
                mixed_batch(one, chosen, x)
            with Operations() as operations:
                mixed_batch(one, chosen, x)
            counts = flops.get_total_flops(), operations.counts.total()
            reference = reference or counts
            ratio = median(own / other for own, other in zip(seconds[method], seconds[PEFT], strict=True))
            costs = [f"{counts[0] / reference[0]:.2f}", f"{counts[1]:,}", f"{ratio:.2f}"]
            yield [method, f"{different} of {samples}", *costs]


def many(counts: list[int], rounds: int, limit: float = math.inf) -> Iterator[list[str]]:
    """Yield the rows of the table of switching; a method that needs more than `limit` seconds gets fewer adapters."""
    yield [
        "method",
        "adapters",
        "adding the last over one of the first",
        "Python calls to switch",
        "time to switch",
        "tensors per adapter",
        "objects per adapter",
    ]
    import peft  # noqa: F401  # its modules are no objects of adapters, and are read slowly while memory is traced

    for count in counts:
        names = [f"a{i}" for i in range(count)]
        found = {method: _switching(method, names, rounds, limit) for method in (PEFT, *KINDS)}
        for method, one in found.items():
            ratio = median(own / other for own, other in zip(one.seconds, found[PEFT].seconds, strict=True))
            costs = [f"{one.growth:.2f}", f"{one.calls:,}", f"{ratio:.3f}"]
            adapters = f"{count:,}" if one.adapters == count else f"{one.adapters:,} of {count:,}, stopped"
            yield [method, adapters, *costs, f"{one.tensors / 1e3:,.0f} KB", f"{one.objects / 1e3:,.1f} KB"]


class Switching(NamedTuple):
    """What switching among adapters costs, and the bytes of one adapter in tensors and in Python's other objects."""

    adapters: int
    growth: float
    """The time of adding one of the last adapters over that of one of the first, without the very first."""
    calls: int
    seconds: list[float]
    tensors: float
    objects: float


def _switching(method: str, names: list[str], rounds: int, limit: float) -> Switching:
    base = nn.Sequential(Layer(384, 1152), Layer(384, 384))
    own = sum(parameter.nbytes for parameter in base.parameters())
    gc.collect()
    tracemalloc.start()  # traces what Python allocates: the values of tensors are not among it
    one = served(method, base, ["0.layer", "1.layer"], names, limit)
    adapters = len(one.seconds)
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tensors = sum(parameter.nbytes for parameter in one.model.parameters()) - own
    one.switch(names[1])
    calls = python_calls(partial(one.switch, names[0]))
    inputs = {"x": torch.empty(())}
    seconds = [timed(partial(one.switch, names[turn % 2]), inputs) for turn in range(10 * rounds)]
    growth = median(one.seconds[-9:]) / median(one.seconds[1:10])
    return Switching(adapters, growth, calls, seconds, tensors / adapters, objects / adapters)


def main() -> None:
    """Parse the command line, measure, and print the tables."""
    parser = command_line.parser("serving", __doc__)
    parser.add_argument("--samples", type=int, default=8, help="images of a batch; 0 leaves its table out")
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[10, 100, 1000], help="numbers of adapters to switch"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for adding the adapters of one method")
    parser.add_argument("--output", type=Path, help="file for the tables")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    tables = [("Two layers of 384 to 1,152 and 384 features", many(options.adapters, options.rounds, options.limit))]
    if options.samples:
        title = f"ViT-S/16, {options.samples} images, an adapter per image"
        tables.insert(0, (title, batches(options.samples, options.rounds)))
    text = ""
    for title, rows in tables:
        above, found = f"{text}\n{title}\n\n".lstrip(), []
        for row in tqdm(rows, unit="row", leave=False):
            found.append(row)
            text = above + table(found)
            if options.output:  # after every row, so that an interrupted run keeps its results
                write_text(options.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
