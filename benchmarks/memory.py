"""The bytes that a training step keeps from forward to backward, and the FLOPs that they save.

python -m benchmarks.memory
python -m benchmarks.memory --output benchmarks/results/memory.md
python -m benchmarks.memory --sizes 1 --targets attention --peak --methods peft_randlora ours ours_memory
python -m benchmarks.memory --sizes 1 4 16 --peak --methods peft_lora full frozen ours ours_memory ours_structured

Bytes and FLOPs are counted on the meta device, without computing anything. Figures are relative to PEFT's RandLora. The
last rows checkpoint the blocks: what is kept within one block is then recomputed, and counts once.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import command_line, measure
from benchmarks.methods import EVERY
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Row
from randlora_vision.files.atomic import write_text

REFERENCE = "peft_randlora"
CHOICES = [name for name in EVERY if name != "peft_vera"]
CHECKPOINTED = ("peft_randlora", "ours", "ours_memory")


def costs(
    workload: str,
    sizes: Sequence[int],
    which: str = "attention+mlp",
    names: Sequence[str] = CHOICES,
    peak: bool = False,
) -> list[list[str]]:
    """Return the rows of the table, and its head before them; `peak` adds the memory that a real run takes."""
    base = WORKLOADS[workload].build()
    names = list(dict.fromkeys((REFERENCE, *names)))
    rows = [(name, False) for name in names]
    if hasattr(base, "set_grad_checkpointing"):
        rows += [(name, True) for name in CHECKPOINTED if name in names]
    counts: dict[tuple[str, bool], list[list[int]]] = {}
    for key in rows:
        counts[key] = [list(counted(Row(workload, size, which), base, *key)) for size in sizes]
        if peak and not key[1]:
            for size, found in zip(sizes, counts[key], strict=True):
                row = Row(workload, size, which)
                found.append(measure.peak_memory(row, key[0], torch.device("cpu"), torch.float32))
    head = ("bytes", "FLOPs", "peak") if peak else ("bytes", "FLOPs")
    lines = [[WORKLOADS[workload].unit, *(f"{what}, {size}" for size in sizes for what in head)]]
    for (name, checkpointed), by_size in counts.items():
        pairs = zip(by_size, counts[REFERENCE, False], strict=True)
        figures = [f"{own[i] / peft[i]:.2f}" if i < len(own) else "-" for own, peft in pairs for i in range(len(head))]
        lines.append([f"{EVERY[name].title}{', checkpointed' if checkpointed else ''}", *figures])
    return lines


def counted(row: Row, base: nn.Module, name: str, checkpointed: bool = False) -> tuple[int, int]:
    """Return the bytes kept for the backward pass, and the FLOPs of the step."""
    workload, meta = WORKLOADS[row.workload], torch.device("meta")
    model = copy.deepcopy(base).requires_grad_(False)
    if checkpointed:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    model = EVERY[name].apply(model, workload.targets(model, row.which), workload.rank).train().to(meta)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    inputs = workload.inputs(row.size, meta)
    trainee = measure.Trainee(model, optimizer, inputs, workload.loss, torch.float32)
    return measure.kept_bytes(trainee), measure.flops(trainee)


def main() -> None:
    """Parse the command line, count, and print and write the table."""
    parser = command_line.parser("memory", __doc__)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="vit_s", help="the model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="images, pairs or tokens")
    parser.add_argument(
        "--targets", choices=("attention", "attention+mlp"), default="attention+mlp", help="adapted layers"
    )
    parser.add_argument("--methods", nargs="+", choices=sorted(EVERY), default=CHOICES, help="beside PEFT's RandLora")
    parser.add_argument(
        "--peak", action="store_true", help="the peak memory of real steps too, each in a fresh process"
    )
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    text = table(costs(options.workload, options.sizes, options.targets, options.methods, options.peak))
    text = f"{WORKLOADS[options.workload].title}, {options.targets}, rank 32\n\n{text}"
    print(text, end="")
    if options.output:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
