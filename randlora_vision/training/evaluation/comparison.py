"""Comparisons of the runs of several methods: a table and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora_vision.training.evaluation.curves import HEADLINES, Compared, plot_comparison
from randlora_vision.training.evaluation.intervals import seeds_half_width
from randlora_vision.training.evaluation.results import headline
from randlora_vision.training.harness.run_folder import RunFolder

Summary = Mapping[str, Any]
"""The content of a summary.json, with the path of its run folder as "folder"."""
Summaries = Mapping[str, Sequence[Summary]]
"""By method, one per seed."""
LABELS: Mapping[str, str] = {
    "randlora": "RandLoRA",
    "lora": "LoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "nola": "NoLA",
    "full": "full fine-tuning",
    "linear-probe": "linear probe",
}


def table(summaries: Summaries) -> str:
    """Return the comparison as a Markdown table whose columns also align in a terminal."""
    first = next(iter(summaries.values()))[0]
    tasks: Mapping[str, str] = first["tasks"]
    kind = next(kind for name, kind in HEADLINES.items() if name in first["after"][next(iter(tasks))])
    rows = [
        [
            "method",
            "trained numbers",
            "file (bytes)",
            *(f"{name}, {kind}" for name in measured(first).values()),
            "training",
        ]
    ]
    for method, runs in summaries.items():
        numbers = [f"{runs[0]['trained_numbers']:,}", f"{runs[0]['file_bytes']:,}"]
        seconds = statistics.mean(run["seconds"] for run in runs)
        rows.append([LABELS[method], *numbers, *(_move(runs, task) for task in tasks), f"{seconds:.0f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def measured(summary: Summary) -> dict[str, str]:
    """Return, for every test of a run, its data and which and how many of its images were measured."""
    counts = {test: values.get("samples", values.get("images")) for test, values in summary["after"].items()}
    return {
        test: f"{name} ({counts[test]} {summary['splits'][test]} images)" for test, name in summary["tasks"].items()
    }


def _move(runs: Sequence[Summary], task: str) -> str:
    """Return the headline before and after training; over several seeds its mean, with half the 95% interval."""
    after = [headline(run["after"][task]) for run in runs]
    width = f" ± {100 * seeds_half_width(after):.1f}" if len(runs) > 1 else ""
    before = _mean_before(runs, task)
    return f"{'' if before is None else f'{before:.1%} -> '}{statistics.mean(after):.1%}{width}"


def draw(folder: Path, summaries: Summaries) -> None:
    """Plot the accuracy of each method over the steps with the first seed, and the mean before and after training."""
    compared = []
    for method, runs in summaries.items():
        accuracies = {
            name: (_mean_before(runs, task), statistics.mean(headline(run["after"][task]) for run in runs))
            for task, name in measured(runs[0]).items()
        }
        label = f"{LABELS[method]} ({runs[0]['trained_numbers']:,} trained)"
        compared.append(Compared(label, RunFolder(Path(runs[0]["folder"])).read_metrics(), accuracies))
    first = next(iter(summaries.values()))[0]
    name = next(iter(first["tasks"].values()))
    plot_comparison(compared, f"{first['model']} adapted to {name}", folder / "comparison.png")


def _mean_before(runs: Sequence[Summary], task: str) -> float | None:
    """Return the mean before training; None for a new classifier, which was not measured."""
    if any(run["before"] is None for run in runs):
        return None
    return statistics.mean(headline(run["before"][task]) for run in runs)
