"""The bytes that a training step keeps from forward to backward, and the FLOPs that they save.

python -m benchmarks.memory
python -m benchmarks.memory --workload vit_b --sizes 16 64 --output benchmarks/results/memory.md

Everything is counted on the meta device, without computing anything. Figures are relative to PEFT's RandLora. The last
rows checkpoint the blocks: what is kept within one block is then recomputed, and counts once.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import measure
from benchmarks.methods import METHODS
from benchmarks.workloads import WORKLOADS, Row
from randlora_vision import RandLoRAConfig, inject
from randlora_vision.files.atomic import write_text


def _pinned(bases: str, compute: str) -> Callable[[nn.Module, Sequence[str], int], nn.Module]:
    def apply(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
        inject(model, RandLoRAConfig(rank=rank, target_modules=list(targets), bases=bases, compute=compute))
        return model

    return apply


CHOICES: dict[str, Callable[[nn.Module, Sequence[str], int], nn.Module]] = {
    "PEFT RandLora": METHODS["peft_randlora"].apply,
    "PEFT LoRA": METHODS["peft_lora"].apply,
    "full fine-tuning": METHODS["full"].apply,
    **{
        f"ours, {title} bases, compute={compute}": _pinned(bases, compute)
        for title, bases in (("dense", "uniform"), ("structured", "structured"))
        for compute in ("auto", "memory", "factored", "dense")
    },
}
CHECKPOINTED = ("PEFT RandLora", "ours, dense bases, compute=auto", "ours, dense bases, compute=memory")


def table(workload: str, sizes: Sequence[int], which: str = "attention+mlp") -> list[str]:
    """Return the lines of the table."""
    base = WORKLOADS[workload].build()
    rows = [(name, False) for name in CHOICES]
    if hasattr(base, "set_grad_checkpointing"):
        rows += [(name, True) for name in CHECKPOINTED]
    counts = {key: [counted(Row(workload, size, which), base, *key) for size in sizes] for key in rows}
    head = " | ".join(f"bytes, {size} | FLOPs, {size}" for size in sizes)
    lines = [f"| {WORKLOADS[workload].unit} | {head} |", "| --- |" + " ---: |" * (2 * len(sizes))]
    for (name, checkpointed), found in counts.items():
        pairs = zip(found, counts["PEFT RandLora", False], strict=True)
        figures = " | ".join(f"{own[0] / peft[0]:.2f} | {own[1] / peft[1]:.2f}" for own, peft in pairs)
        lines.append(f"| {name}{', checkpointed' if checkpointed else ''} | {figures} |")
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="vit_s", help="the model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="images, pairs or tokens")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    text = "\n".join(table(options.workload, options.sizes)) + "\n"
    print(f"{WORKLOADS[options.workload].title}, attention and MLP, rank 32\n\n{text}")
    if options.output:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
