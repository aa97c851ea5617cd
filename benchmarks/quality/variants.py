"""Varies what the defaults of RandLoRA fix, one at a time: warmup, alpha, initialisation (the benchmark has the ranks).

python -m benchmarks.quality.variants --data DIR --out DIR

With structured bases at the default rate, on 16-shot MNIST and on 100 steps of the digits of the demo. A stopped
command goes on where it was.
"""

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.quality.methods import ALPHA_PER_RANK, Method, randlora
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import WARMUP, Trainee, append_line, outcome, read_lines
from randlora_vision import RandLoRAConfig
from randlora_vision.errors import user_errors

VARIED = ("mnist16", "digits-short")
FILE = "variants.jsonl"


@dataclass(frozen=True)
class Variant:
    """Settings of one run; the defaults are those of the benchmark.

    Attributes:
        warmup: Part of the steps.
        alpha_per_rank: alpha / rank.
        init: Which factor starts at zero.
    """

    warmup: float = WARMUP
    alpha_per_rank: float = ALPHA_PER_RANK
    init: str = "lambda-zero"

    def train(self, name: str, data: Path, seed: int) -> dict[str, Any]:
        """Train and evaluate on the task of this name; return the figures."""
        method, task = Method("", randlora(RandLoRAConfig.bases, self.alpha_per_rank, self.init), None), TASKS[name]
        problem = task.make(data, seed)
        trainee = Trainee(problem, method, task.ranks[1], task, 0, seed, self.warmup, factor=1.0)
        return outcome(trainee, task)


VARIANTS = {
    "default": Variant(),
    "no warmup": Variant(warmup=0.0),
    "warmup 30%": Variant(warmup=0.3),
    "alpha = r": Variant(alpha_per_rank=1.0),
    "alpha = 100 r": Variant(alpha_per_rank=100.0),
    "gamma-zero": Variant(init="gamma-zero"),
}


def table_rows(lines: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return a header and rows: the mean test score of every variant, and its difference to the default by seed."""
    held: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        held.setdefault((line["task"], line["variant"]), {})[line["seed"]] = line
    rows = [["task", "variant", "rate", "accuracy", "minus the default (by seed)"]]
    for task, name in product(VARIED, VARIANTS):
        found, default = held.get((task, name), {}), held.get((task, "default"), {})
        common = sorted(found.keys() & default.keys())
        if not common:
            continue
        scores = [100 * found[seed]["test"] for seed in common]
        changes = [score - 100 * default[seed]["test"] for score, seed in zip(scores, common, strict=True)]
        by_seed = ", ".join(f"{change:+.1f}" for change in changes)
        change = "" if name == "default" else f"{statistics.mean(changes):+.1f} ({by_seed})"
        rate = f"{found[common[0]]['lr']:.1e}"
        rows.append([TASKS[task].title, name, rate, f"{statistics.mean(scores):.1f}", change])
    return rows


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing."""
    parser = command_line.parser("quality.variants", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=VARIED, default=VARIED)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of the compared libraries
    path = options.out / FILE
    done = {(line["task"], line["variant"], line["seed"]) for line in read_lines(path)}
    for task, seed, (name, variant) in product(options.tasks, range(options.seeds), VARIANTS.items()):
        if (task, name, seed) not in done:
            figures = variant.train(task, options.data, seed)
            append_line(path, {"task": task, "variant": name, "seed": seed, **figures})
            print(task, name, seed, figures["test"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
