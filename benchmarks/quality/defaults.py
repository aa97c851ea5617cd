"""Measures the default rate of RandLoRA (`suggest_lr` with features), a third of it, and three times it, on every task.

python -m benchmarks.quality.defaults --data DIR --out DIR

A stopped command goes on where it was. The best rate of the grid comes from the runs of `benchmarks.quality`.
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.report import rows
from benchmarks.quality.search import BUDGETS, Results
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import Trainee, append_line, outcome, read_by
from randlora_vision.errors import user_errors

FACTORS = {"a third": 1 / 3, "default": 1.0, "three times": 3.0}
KINDS = ("structured", "uniform")
FILE = "defaults.jsonl"


@dataclass(frozen=True)
class Trial:
    """A run at a multiple of the default rate: `at` is a key of `FACTORS`, `budget` an index of the task's ranks."""

    task: str
    method: str
    budget: int
    at: str
    seed: int

    def train(self, data: Path) -> dict[str, Any]:
        """Train and evaluate; return the figures."""
        task = TASKS[self.task]
        problem = task.make(data, self.seed)
        rank = task.ranks[self.budget]
        return outcome(Trainee(problem, METHODS[self.method], rank, task, 0, self.seed, factor=FACTORS[self.at]), task)


def read_trials(path: Path) -> dict[Trial, dict[str, Any]]:
    """Return the lines of a file by the trial that each describes."""
    return read_by(Trial, path)


def table_rows(results: Results, trials: Mapping[Trial, Mapping[str, Any]]) -> list[list[str]]:
    """Return a header and rows: the score at the default rate, and differences to it over the seeds that both have."""
    others = [at for at in FACTORS if at != "default"]
    lines = [["task", "bases", "trained", "default", "seeds", *others, "best of the grid", "its rate / default"]]
    for task in TASKS:
        best = {(row.method, row.result["budget"]): row for row in rows(results, task)}
        for method, budget in product(KINDS, range(len(BUDGETS))):
            found: dict[str, dict[int, float]] = {at: {} for at in FACTORS}
            for trial, line in trials.items():
                if (trial.task, trial.method, trial.budget) == (task, method, budget):
                    found[trial.at][trial.seed] = line["test"]
            default, top = found.pop("default"), best.get((method, budget))
            if not default or not top:
                continue
            rate = trials[Trial(task, method, budget, "default", 0)]["lr"]
            lines.append(
                [
                    TASKS[task].title,
                    method,
                    f"{top.result['trained']:,}",
                    f"{100 * statistics.mean(default.values()):.1f}",
                    str(len(default)),
                    *(_difference(found[at], default) for at in others),
                    _difference(top.scores, default),
                    f"{top.result['lr'] / rate:.2g}",
                ]
            )
    return lines


def _difference(scores: Mapping[int, float], default: Mapping[int, float]) -> str:
    """Return the mean difference in points over the seeds that both have; empty without one."""
    common = scores.keys() & default.keys()
    return f"{100 * statistics.mean(scores[seed] - default[seed] for seed in common):+.1f}" if common else ""


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing."""
    parser = command_line.parser("quality.defaults", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=["medium"])
    parser.add_argument("--at", nargs="+", choices=FACTORS, default=list(FACTORS), help="multiples of the rate")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of the compared libraries
    path = options.out / FILE
    done = read_trials(path)
    budgets = [BUDGETS.index(name) for name in options.budgets]
    for values in product(options.tasks, options.methods, budgets, options.at, range(options.seeds)):
        if (trial := Trial(*values)) not in done:
            figures = trial.train(options.data)
            append_line(path, {**asdict(trial), **figures})
            print(*astuple(trial), figures["lr"], figures["test"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
