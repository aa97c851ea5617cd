"""The runs as Markdown tables: every method at its best rate, the default rate of RandLoRA, and the kinds of bases."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.search import Results, best_exponent, unsearched
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.report import size_text, table
from randlora_vision.training.evaluation.intervals import seeds_half_width

_Z = 1.959963984540054  # the 97.5% quantile of the standard normal distribution
MEASURED = (1, -1)  # steps and memory are those of the second budget, and of methods of one size
BASES = tuple(name for name, method in METHODS.items() if method.lr is None)


@dataclass(frozen=True)
class Row:
    """A method of one size at its best rate on one task.

    Attributes:
        scores: Of the test, by seed.
        half_width: Of the 95% interval of the mean score.
        others: Means of the other tests.
        result: The line of one run, for what does not depend on the seed.
    """

    task: str
    method: str
    exponent: float
    scores: Mapping[int, float]
    half_width: float
    others: Mapping[str, float]
    result: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """The mean score over the seeds."""
        return statistics.mean(self.scores.values())


def half_width(scores: Sequence[float], samples: int) -> float:
    """Return half the 95% interval of a mean score over seeds, each a proportion of the same `samples` (0: of none).

    Two sources: which samples are in the test, and the seed, by Student's t; with one seed the first alone, or NaN.
    """
    mean = statistics.mean(scores)
    inside = min(max(mean, 0.0), 1.0)
    samples_part = _Z * math.sqrt(inside * (1 - inside) / samples) if samples else 0.0
    if len(scores) == 1:
        return samples_part if samples else math.nan
    return math.hypot(samples_part, seeds_half_width(scores))


def rows(results: Results, task: str) -> list[Row]:
    """Return the methods whose search on a task is done, in the order of `METHODS`, by size."""
    found = []
    sizes = {(run.method, run.budget) for run in results if run.task == task}
    for method, budget in sorted(sizes, key=lambda size: (list(METHODS).index(size[0]), size[1])):
        exponent = best_exponent(results, task, method, budget)
        if exponent is None or unsearched(results, task, method, budget):
            continue
        lines = {
            run.seed: result
            for run, result in results.items()
            if (run.task, run.method, run.budget, run.exponent) == (task, method, budget, exponent)
        }
        scores = {seed: line["test"] for seed, line in sorted(lines.items())}
        result = lines[min(lines)]
        others = {name: statistics.mean(line[name] for line in lines.values()) for name in result if " " in name}
        width = half_width(list(scores.values()), TASKS[task].samples)
        found.append(Row(task, method, exponent, scores, width, others, result))
    return found


def markdown(results: Results, steps: Iterable[Mapping[str, Any]], peaks: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return the whole report, without a title, from the lines of runs.jsonl, steps.jsonl and peaks.jsonl."""
    memory = {(line["task"], line["method"]): line["peak_bytes"] for line in peaks}
    ratios = {(line["task"], line["method"]): line["ratio"] for line in steps}
    tasks = tasks_of(results)
    parts = [_task_section(TASKS[task], rows(results, task), ratios, memory) for task in tasks]
    parts.append(f"## Minus LoRA, each at its best rate, seed by seed\n\n{table(minus_lora(results, tasks))}")
    parts.append(f"## Kinds of bases, each at its best rate\n\n{table(kinds_of_bases(results, tasks))}")
    return "\n".join(parts)


def tasks_of(results: Results) -> list[str]:
    """Return the tasks that have runs, in the benchmark's order."""
    return [task for task in TASKS if any(run.task == task for run in results)]


def _task_section(
    task: Task,
    found: Sequence[Row],
    ratios: Mapping[tuple[str, str], float],
    memory: Mapping[tuple[str, str], int],
) -> str:
    full, probe = (next((row.mean for row in found if row.method == name), math.nan) for name in ("full", "probe"))
    others = sorted({name for row in found for name in row.others})
    header = [
        "method",
        "trained",
        f"{task.score}, 95%",
        "gap closed",
        *others,
        "best rate",
        "seeds",
        "step",
        "peak",
        "file",
    ]
    lines = []
    for row in found:
        gap = (row.mean - probe) / (full - probe)
        measured = (row.task, row.method) if row.result["budget"] in MEASURED else None
        ratio = ratios.get(measured) if measured else None
        peak = memory.get(measured) if measured else None
        width = "" if math.isnan(row.half_width) else f" ± {100 * row.half_width:.1f}"
        lines.append(
            [
                METHODS[row.method].title,
                f"{row.result['trained']:,}",
                f"{100 * row.mean:.1f}{width}",
                "" if math.isnan(gap) else f"{gap:.0%}",
                *(f"{100 * row.others[name]:.1f}" if name in row.others else "" for name in others),
                f"{row.result['lr']:.1e}",
                str(len(row.scores)),
                "" if ratio is None else f"{ratio:.2f}",
                "" if peak is None else size_text(peak),
                f"{row.result['file_bytes']:,}",
            ]
        )
    return f"## {task.title}\n\n{table([header, *lines])}\n{told_apart(found)}\n"


def told_apart(found: Sequence[Row]) -> str:
    """Return a sentence on which methods have an interval that reaches that of the best one."""
    adapters = [row for row in found if row.method not in ("full", "probe")]
    if not adapters:
        return ""
    best = max(adapters, key=lambda row: row.mean)
    name = _sized_name(best, adapters)
    if math.isnan(best.half_width):
        return f"Best adapter: {name}; one seed, no interval."
    below = [row for row in adapters if row.mean + row.half_width < best.mean - best.half_width]
    if not below:
        return (
            f"Best adapter: {name}. This task does not tell the {len(adapters)} adapters apart: all intervals overlap."
        )
    words = ", ".join(_sized_name(row, adapters) for row in below)
    return (
        f"Best adapter: {name}. Below it with 95% intervals that do not overlap: {words}; not told apart: the others."
    )


def _sized_name(row: Row, among: Sequence[Row]) -> str:
    several = sum(other.method == row.method for other in among) > 1
    return f"{METHODS[row.method].title} ({row.result['trained']:,})" if several else METHODS[row.method].title


def kinds_of_bases(results: Results, tasks: Sequence[str]) -> list[list[str]]:
    """Return the rows of a table, the first its head: every kind of bases minus uniform ones, seed by seed."""
    lines = [["task", "bases", "trained", "minus uniform, points, 95%", "seeds"]]
    for task in tasks:
        for row, difference, seeds in differences(rows(results, task), "uniform"):
            if row.method in BASES:
                lines.append([TASKS[task].title, row.method, f"{row.result['trained']:,}", difference, str(seeds)])
    return lines


def minus_lora(results: Results, tasks: Sequence[str]) -> list[list[str]]:
    """Return the rows of a table, the first its head: every method of the second size minus LoRA, seed by seed."""
    cells: dict[str, dict[str, str]] = {}
    for task in tasks:
        found = [row for row in rows(results, task) if row.result["budget"] in MEASURED]
        for row, difference, seeds in differences(found, "lora"):
            cells.setdefault(row.method, {})[task] = difference if seeds == 1 else f"{difference} ({seeds} seeds)"
    header = ["minus LoRA, points, 95%", *(TASKS[task].title for task in tasks)]
    lines = [[METHODS[name].title, *(cells[name].get(task, "") for task in tasks)] for name in METHODS if name in cells]
    return [header, *lines]


def differences(found: Sequence[Row], reference: str) -> Iterator[tuple[Row, str, int]]:
    """Yield the other rows with the mean difference to the reference of their size, its 95% interval, and the seeds.

    Methods of one size are compared with the second size of the reference.
    """
    sizes = {row.result["budget"]: row for row in found if row.method == reference}
    for row in found:
        size = row.result["budget"]
        other = sizes.get(MEASURED[0] if size == MEASURED[1] else size)
        if row.method == reference or other is None:
            continue
        points = [100 * (row.scores[seed] - other.scores[seed]) for seed in row.scores if seed in other.scores]
        width = half_width(points, 0)
        yield row, f"{statistics.mean(points):+.1f}" + ("" if math.isnan(width) else f" ± {width:.1f}"), len(points)
