"""Varies what the defaults of RandLoRA fix, one at a time: warmup, alpha, initialisation and rank.

python -m benchmarks.quality.variants --data DIR --out DIR

All at the default rate (`suggest_lr`) with structured bases on 16-shot MNIST. A stopped command goes on where it was.
"""

import json
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.quality.methods import ALPHA_PER_RANK, Method, randlora
from benchmarks.quality.search import DEFAULT_RATES
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import WARMUP, Trainee, append_line, outcome, read_lines
from randlora_vision.errors import user_errors

TASK, BASES = "mnist16", "structured"
FILE = "variants.jsonl"


@dataclass(frozen=True)
class Variant:
    """Settings of one run; the defaults are those of the benchmark.

    Attributes:
        warmup: Part of the steps.
        alpha_per_rank: alpha / rank.
        init: Which factor starts at zero.
        rank: Rank of the bases.
    """

    warmup: float = WARMUP
    alpha_per_rank: float = ALPHA_PER_RANK
    init: str = "lambda-zero"
    rank: int = TASKS[TASK].ranks[1]

    def train(self, data: Path, seed: int) -> dict[str, Any]:
        """Train and evaluate; return the figures."""
        method = Method("", randlora(BASES, self.alpha_per_rank, self.init), None)
        problem = TASKS[TASK].make(data, seed)
        return outcome(
            Trainee(problem, method, self.rank, TASKS[TASK], DEFAULT_RATES[0], seed, self.warmup), TASKS[TASK]
        )


VARIANTS = {
    "default": Variant(),
    "no warmup": Variant(warmup=0.0),
    "warmup 30%": Variant(warmup=0.3),
    "alpha = r": Variant(alpha_per_rank=1.0),
    "alpha = 100 r": Variant(alpha_per_rank=100.0),
    "gamma-zero": Variant(init="gamma-zero"),
    "rank 16": Variant(rank=16),
    "rank 64": Variant(rank=64),
}


def table_rows(lines: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return a header and rows: the mean test score of every variant, and its difference to the default by seed."""
    held: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        held.setdefault(line["variant"], {})[line["seed"]] = line
    default = held.get("default", {})
    rows = [["variant", "trained", "rate", "accuracy", "minus the default (by seed)"]]
    for name in VARIANTS:
        found = held.get(name, {})
        common = sorted(found.keys() & default.keys())
        if not common:
            continue
        scores = [100 * found[seed]["test"] for seed in common]
        changes = [score - 100 * default[seed]["test"] for score, seed in zip(scores, common, strict=True)]
        first = found[common[0]]
        change = (
            "" if name == "default" else f"{statistics.mean(changes):+.1f} ({', '.join(f'{c:+.1f}' for c in changes)})"
        )
        rows.append([name, f"{first['trained']:,}", f"{first['lr']:.1e}", f"{statistics.mean(scores):.1f}", change])
    return rows


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing."""
    parser = command_line.parser("quality.variants", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of the compared libraries
    path = options.out / FILE
    done = {(line["variant"], line["seed"]) for line in read_lines(path)}
    for seed in range(options.seeds):
        for name, variant in VARIANTS.items():
            if (name, seed) not in done:
                line = {"variant": name, "seed": seed, **variant.train(options.data, seed)}
                append_line(path, line)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
