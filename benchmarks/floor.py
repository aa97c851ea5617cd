"""Where the time of a training step goes at few tokens, and the least that it can be with the same operations.

python -m benchmarks.floor --output benchmarks/results/floor.md

Three times are taken in turn, as in `benchmarks.clock`, and divided by that of a step with PEFT's LoRA:

- a step of two blocks of ViT-S;
- a step of a ViT of width 24 with rank 2, so that every layer runs the same operations on almost no numbers: what is
  left are calls in Python, the dispatcher and autograd;
- products with frozen weights alone, forward and backward, with as many tokens. The FLOPs of a method at their rate are
  its arithmetic, if all its products were as efficient as those and the rest (sums, scaling, layouts) took no time.

The floor is the sum of the last two. What a step takes beyond it is for small products and for passes over memory, some
of which, such as those of attention, are in every method's step. The last column adds as much as LoRA takes beyond it.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import clock, command_line, measure
from benchmarks.methods import EVERY
from benchmarks.operations import Operations
from benchmarks.report import table
from benchmarks.workloads import Row
from randlora_vision.files.atomic import write_text

METHODS = ("peft_lora", "peft_randlora", "ours", "ours_structured")
ROWS = (("vit_s_few", 1), ("vit_s_few", 4), ("vit_s_few", 16), ("vit_s", 1))
HEAD = (
    "tokens",
    "method",
    "operators of a step",
    "step",
    "the same operators, no arithmetic",
    "FLOPs",
    "floor",
    "and LoRA's rest",
)
_ALONE = "products alone"


def lines(rows: Sequence[Row], setting: clock.Setting) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    narrow = {f"{name}, narrow": one for name, one in clock.prepared(_NARROW, "eager", setting).items()}
    operators = {name: _operators(narrow[f"{name}, narrow"]) for name in setting.methods}
    for row in rows:
        trainees = clock.prepared(row, "eager", setting)
        tokens = _tokens(next(iter(trainees.values())))
        alone = _products(tokens)
        taken = clock.seconds({**trainees, **narrow, _ALONE: alone}, setting.budget)
        reference = taken[clock.REFERENCE]

        def share(name: str, taken: dict[str, list[float]] = taken, reference: list[float] = reference) -> float:
            return median(own / whole for own, whole in zip(taken[name], reference, strict=True))

        rate = share(_ALONE) / measure.flops(alone)
        parts = {name: (share(f"{name}, narrow"), rate * measure.flops(trainees[name])) for name in trainees}
        rest = 1.0 - sum(parts[clock.REFERENCE])
        for name in setting.methods:
            least = sum(parts[name])
            shares = (share(name), *parts[name], least, least + rest)
            yield [f"{tokens:,}", EVERY[name].title, f"{operators[name]:,}", *(f"{value:.2f}" for value in shares)]


_NARROW = Row("vit_narrow", 1, "attention+mlp")


def _operators(trainee: measure.Trainee) -> int:
    """Operators of forward and backward that work on the device."""
    with Operations() as operations:
        trainee.forward().backward()
    trainee.optimizer.zero_grad(set_to_none=True)
    return operations.counts.total() + operations.accumulations


def _tokens(trainee: measure.Trainee) -> int:
    """Tokens that the blocks get."""
    found: list[int] = []
    block = next(module for name, module in trainee.model.named_modules() if name.endswith("blocks.0"))
    hook = block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[:-1].numel()))
    trainee.forward()
    hook.remove()
    return found[0]


def _products(tokens: int, width: int = 384, hidden: int = 1536) -> measure.Trainee:
    """Products with frozen weights and nothing in between: those of two MLPs."""
    layers = [nn.Linear(*sides, bias=False) for sides in 2 * ((width, hidden), (hidden, width))]
    x = torch.randn(tokens, width, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.0)
    return measure.Trainee(
        nn.Sequential(*layers).requires_grad_(False), optimizer, {"input": x}, Tensor.sum, torch.float32
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and print and write the table."""
    parser = command_line.parser("floor", __doc__)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many rows, from the fewest tokens on")
    parser.add_argument("--methods", nargs="+", choices=sorted(EVERY), default=list(METHODS), help="what is compared")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the models")
    parser.add_argument("--seconds", type=float, default=40.0, help="timed rounds of a row take about this long")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    torch.set_num_threads(1)
    setting = clock.Setting(options.methods, options.blocks, options.seconds, torch.device("cpu"))
    rows = [Row(name, size, "attention+mlp") for name, size in ROWS[: options.rows]]
    head = f"Parts of a step over the time of a step with PEFT's LoRA: medians. {clock.where(setting)}\n\n"
    found = [list(HEAD)]
    for line in tqdm(lines(rows, setting), total=len(rows) * len(options.methods), unit="row"):
        found.append(line)
        if options.output:  # after every row, so that an interrupted run keeps its results
            write_text(options.output, head + table(found))
    print(head + table(found), end="")


if __name__ == "__main__":
    main()
