"""Which run comes next: the grid of rates is widened until its best rate is not at an edge, then the seeds follow."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.train import Run

Results = Mapping[Run, Mapping[str, Any]]
BUDGETS = ("small", "medium", "large")
_START = (0, -1, 1)
WIDEST = 4  # exponents from -4 to 4: a factor of 100 in either direction
GRID = range(-WIDEST, WIDEST + 1)


def best_exponent(results: Results, task: str, method: str, budget: int) -> float | None:
    """Return the exponent with the highest mean on the validation samples, over the seeds that all of them have.

    Of equal ones, the closest to the centre. None before the first run.
    """
    means = exponent_means(results, task, method, budget, "val")
    return min(means, key=lambda exponent: (-means[exponent], abs(exponent), exponent)) if means else None


def exponent_means(
    results: Results, task: str, method: str, budget: int, figure: str, exponents: Container[float] = GRID
) -> dict[float, float]:
    """Return the mean of a figure by exponent, over the seeds that were run with all of those among `exponents`."""
    held: dict[float, dict[int, float]] = {}
    for run, result in results.items():
        if (run.task, run.method, run.budget) == (task, method, budget) and run.exponent in exponents:
            held.setdefault(run.exponent, {})[run.seed] = result[figure]
    if not held:
        return {}
    seeds = set.intersection(*(set(values) for values in held.values())) or set()
    return {exponent: sum(values[seed] for seed in seeds) / len(seeds) for exponent, values in held.items() if seeds}


def unsearched(results: Results, task: str, method: str, budget: int, search_seeds: Sequence[int] = (0,)) -> list[int]:
    """Return the exponents that the search still needs: the first three, then those beyond a best one at the edge."""
    tried = sorted({*_START, *map(int, exponent_means(results, task, method, budget, "val"))})
    runs = {exponent: [Run(task, method, budget, exponent, seed) for seed in search_seeds] for exponent in tried}
    missing = [exponent for exponent in sorted(tried, key=abs) if any(run not in results for run in runs[exponent])]
    if missing:
        return missing
    best = best_exponent(results, task, method, budget)
    beyond = [tried[0] - 1] if best == tried[0] else [tried[-1] + 1] if best == tried[-1] else []
    return [exponent for exponent in beyond if abs(exponent) <= WIDEST]


def next_run(
    results: Results, task: str, method: str, budget: int, search_seeds: Sequence[int], seeds: Sequence[int]
) -> Run | None:
    """Return the next run of a method at one budget, or None when all is done."""
    budget = budget if METHODS[method].sized else -1

    def missing(exponents: Sequence[float], seeds: Sequence[int]) -> Run | None:
        runs = (Run(task, method, budget, exponent, seed) for seed in seeds for exponent in exponents)
        return next((run for run in runs if run not in results), None)

    if wanted := unsearched(results, task, method, budget, search_seeds):
        return missing(wanted, search_seeds)
    best = best_exponent(results, task, method, budget)
    assert best is not None
    return missing([best], seeds)


def plan(
    tasks: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[int],
    search_seeds: Sequence[int],
    seeds: Sequence[int],
) -> Iterator[tuple[str, str, int, Sequence[int]]]:
    """Yield (task, method, budget, seeds) in an order in which every stop leaves complete comparisons behind."""
    for task in tasks:
        for budget in budgets:
            for number in range(len(search_seeds), len(seeds) + 1):
                for method in methods:
                    if METHODS[method].sized or budget == budgets[0]:
                        yield task, method, budget, seeds[:number]
