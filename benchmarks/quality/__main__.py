"""Trains every method on every task with its own best learning rate, and writes the table and the plots.

python -m benchmarks.quality --data DIR --out DIR

A stopped command goes on where it was when it is started again with the same --out. DIR of --data is what
`python -m benchmarks.quality.data DIR` wrote; the linear maps and the digits need none.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.quality import defaults, variants
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plots import plot_budgets, plot_rates
from benchmarks.quality.report import markdown
from benchmarks.quality.search import BUDGETS, next_run, plan
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import Run, append_line, peak_bytes, read_lines, read_results, step_ratios, train
from benchmarks.report import table
from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import write_text

_REFERENCE = "lora"
_VERSIONS = ("torch", "timm", "peft", "transformers", "scikit-learn")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    options = _parser().parse_args(argv)
    warnings.simplefilter("ignore")  # of the compared libraries
    path = options.out / "runs.jsonl"
    results = read_results(path)
    if not options.gather:
        _train(options, path, results)
        _time(options)
        _weigh(options)
    if not results:
        raise ValueError(f"{path} holds no runs")
    _report(results, options.out)


def _train(options: argparse.Namespace, path: Path, results: dict[Run, dict[str, Any]]) -> None:
    """Train what is missing, one line per run."""
    seeds, search_seeds = range(options.seeds), range(options.search_seeds)
    budgets = [BUDGETS.index(name) for name in options.budgets]
    for task, method, budget, wanted in plan(options.tasks, options.methods, budgets, search_seeds, seeds):
        while run := next_run(results, task, method, budget, search_seeds, wanted):
            problem = TASKS[task].make(options.data, run.seed)
            results[run] = train(run, TASKS[task], problem)
            append_line(path, results[run])
            print(json.dumps(results[run]), flush=True)


def _report(results: dict[Run, dict[str, Any]], out: Path) -> None:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _VERSIONS)
    title = f"# Quality benchmark\n\n{len(results)} runs; {versions}.\n\n"
    text = markdown(results, read_lines(out / "steps.jsonl"), read_lines(out / "peaks.jsonl"))
    around = table(defaults.table_rows(results, defaults.read_trials(out / defaults.FILE)))
    varied = table(variants.table_rows(read_lines(out / variants.FILE)))
    sections = f"## The default rate of RandLoRA (`suggest_lr`)\n\n{around}\n## One default changed\n\n{varied}"
    write_text(out / "report.md", f"{title}{text}\n{sections}")
    plot_budgets(results, out / "budgets.png")
    plot_rates(results, out / "rates.png")
    print(f"written: {out}/report.md, budgets.png, rates.png")


def _time(options: argparse.Namespace) -> None:
    """Append the ratios of the methods' steps that are not there yet."""
    path = options.out / "steps.jsonl"
    timed = {(line["task"], line["method"]) for line in read_lines(path)}
    for task in options.tasks:
        missing = [name for name in options.methods if (task, name) not in timed and name != "probe"]
        if missing:
            problem = TASKS[task].make(options.data, 0)
            for name, ratio in step_ratios(TASKS[task], problem, missing, _REFERENCE):
                append_line(path, {"task": task, "method": name, "to": _REFERENCE, "ratio": ratio})


def _weigh(options: argparse.Namespace) -> None:
    """Append the methods' peaks of memory that are not there yet."""
    path = options.out / "peaks.jsonl"
    weighed = {(line["task"], line["method"]) for line in read_lines(path)}
    for task in options.tasks:
        missing = [name for name in options.methods if (task, name) not in weighed]
        if missing:
            problem = TASKS[task].make(options.data, 0)
            for name in missing:
                append_line(path, {"task": task, "method": name, "peak_bytes": peak_bytes(TASKS[task], problem, name)})


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("quality", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=BUDGETS, help="trained numbers")
    parser.add_argument("--seeds", type=int, default=5, help="runs at the best rate")
    parser.add_argument("--search-seeds", type=int, default=2, help="runs at every rate of the grid")
    parser.add_argument("--gather", action="store_true", help="only write the report of the runs that there are")
    return parser


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
