"""What the committed runs of the quality benchmark say about methods, rates and bases, for docs/choosing.md."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from benchmarks.quality import defaults, variants
from benchmarks.quality.methods import METHODS
from benchmarks.quality.report import Row, kinds_of_bases, minus_lora, rows, tasks_of, told_apart
from benchmarks.quality.search import Results
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.train import CENTRE_STEP, Run, read_lines, read_results
from benchmarks.report import table

RUNS = Path(__file__).parent / "quality" / "results" / "runs.jsonl"
_GRID = "mnist16"
_ONE_SIZE = (1, -1)  # the middle budget, and that of methods of one size


@cache
def results() -> Results:
    """Return the committed runs."""
    return read_results(RUNS)


def methods_table() -> str:
    """Return the score of every method of the middle size on every task, and what each task can tell apart."""
    by_task = {
        task: [row for row in rows(results(), task) if row.result["budget"] in _ONE_SIZE]
        for task in tasks_of(results())
    }
    scores = {(row.task, row.method): _score(row) for found in by_task.values() for row in found}
    tried = [name for name in METHODS if any(name == method for _, method in scores)]
    header = ["method", *(TASKS[task].title for task in by_task)]
    lines = [[METHODS[name].title, *(scores.get((task, name), "") for task in by_task)] for name in tried]
    verdicts = [f"- {TASKS[task].title} ({TASKS[task].score}): {told_apart(found)}" for task, found in by_task.items()]
    return f"{table([header, *lines])}\n" + "".join(f"{line}\n" for line in verdicts)


def minus_lora_table() -> str:
    """Return the difference of every method of the middle size to LoRA, seed by seed."""
    return table(minus_lora(results(), tasks_of(results())))


def budgets_table() -> str:
    """Return the scores of the methods that were trained in several sizes, with the numbers that they trained."""
    header = ["task", "method", "smallest", "middle", "largest"]
    lines = []
    for task in tasks_of(results()):
        by_method: dict[str, dict[int, Row]] = {}
        for row in rows(results(), task):
            by_method.setdefault(row.method, {})[row.result["budget"]] = row
        for method, sizes in by_method.items():
            if len(sizes) > 1:
                cells = [
                    f"{sized.result['trained']:,}: {_score(sized)}" if (sized := sizes.get(n)) else "" for n in range(3)
                ]
                lines.append([TASKS[task].title, METHODS[method].title, *cells])
    return table([header, *lines])


def variants_table() -> str:
    """Return what a change of one default does to RandLoRA."""
    return table(variants.table_rows(read_lines(RUNS.with_name(variants.FILE))))


def rates_table() -> str:
    """Return the scores of RandLoRA at `suggest_lr`, a third of it, three times it, and the best rate tried."""
    return table(defaults.table_rows(results(), defaults.read_trials(RUNS.with_name(defaults.FILE))))


def bases_table() -> str:
    """Return the difference of every kind of bases to uniform ones."""
    return table(kinds_of_bases(results(), tasks_of(results())))


def grid_table() -> str:
    """Return RandLoRA's test scores on 16-shot MNIST (seed 0) by the relative step c of its rate."""
    by_bases = {
        method: {run.exponent: line for run, line in results().items() if run == Run(_GRID, method, 1, run.exponent, 0)}
        for method in defaults.KINDS
    }
    exponents = sorted(by_bases["uniform"])
    header = ["`c`", *(f"{CENTRE_STEP * 10 ** (exponent / 2):.2g}" for exponent in exponents)]
    lines = [
        [f"{method} bases", *(f"{100 * found[exponent]['test']:.1f}" for exponent in exponents)]
        for method, found in by_bases.items()
    ]
    return table([header, *lines])


def _score(row: Row) -> str:
    width = "" if math.isnan(row.half_width) else f" ± {100 * row.half_width:.1f}"
    seeds = "" if len(row.scores) == 1 else f" ({len(row.scores)} seeds)"
    return f"{100 * row.mean:.1f}{width}{seeds}"
