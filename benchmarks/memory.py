"""The bytes that a training step keeps from forward to backward, and the FLOPs that they save.

python -m benchmarks.memory
python -m benchmarks.memory --workload vit_b --sizes 16 64 --output benchmarks/results/memory.md

Everything is counted on the meta device, without computing anything. Figures are relative to PEFT's RandLora. The last
rows checkpoint the blocks: what is kept within one block is then recomputed, and counts once.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import command_line, measure
from benchmarks.methods import METHODS, Apply, ours
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Row
from randlora_vision.files.atomic import write_text

CHOICES: dict[str, Apply] = {
    "PEFT RandLora": METHODS["peft_randlora"].apply,
    "PEFT LoRA": METHODS["peft_lora"].apply,
    "full fine-tuning": METHODS["full"].apply,
    **{
        f"ours, {title} bases, compute={compute}": ours(bases, compute)
        for title, bases in (("dense", "uniform"), ("structured", "structured"))
        for compute in ("auto", "memory", "factored", "dense")
    },
}
CHECKPOINTED = ("PEFT RandLora", "ours, dense bases, compute=auto", "ours, dense bases, compute=memory")


def costs(workload: str, sizes: Sequence[int], which: str = "attention+mlp") -> list[list[str]]:
    """Return the rows of the table, and its head before them."""
    base = WORKLOADS[workload].build()
    rows = [(name, False) for name in CHOICES]
    if hasattr(base, "set_grad_checkpointing"):
        rows += [(name, True) for name in CHECKPOINTED]
    counts = {key: [counted(Row(workload, size, which), base, *key) for size in sizes] for key in rows}
    lines = [[WORKLOADS[workload].unit, *(f"{what}, {size}" for size in sizes for what in ("bytes", "FLOPs"))]]
    for (name, checkpointed), found in counts.items():
        pairs = zip(found, counts["PEFT RandLora", False], strict=True)
        figures = [f"{own[i] / peft[i]:.2f}" for own, peft in pairs for i in range(2)]
        lines.append([f"{name}{', checkpointed' if checkpointed else ''}", *figures])
    return lines


def counted(row: Row, base: nn.Module, name: str, checkpointed: bool = False) -> tuple[int, int]:
    """Return the bytes kept for the backward pass, and the FLOPs of the step."""
    workload, meta = WORKLOADS[row.workload], torch.device("meta")
    model = copy.deepcopy(base).requires_grad_(False)
    if checkpointed:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    model = CHOICES[name](model, workload.targets(model, row.which), workload.rank).train().to(meta)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    inputs = workload.inputs(row.size, meta)
    trainee = measure.Trainee(model, optimizer, inputs, workload.loss, torch.float32)
    return measure.kept_bytes(trainee), measure.flops(trainee)


def main() -> None:
    """Parse the command line, count, and print and write the table."""
    parser = command_line.parser("memory", __doc__)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="vit_s", help="the model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="images, pairs or tokens")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    text = table(costs(options.workload, options.sizes))
    print(f"{WORKLOADS[options.workload].title}, attention and MLP, rank 32\n\n{text}")
    if options.output:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
