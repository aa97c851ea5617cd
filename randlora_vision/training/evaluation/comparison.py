"""Comparisons of the runs of several methods: a table and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from randlora_vision.training.data.split_names import images_of
from randlora_vision.training.evaluation.curves import HEADLINES, Compared, plot_comparison, plot_measures
from randlora_vision.training.evaluation.intervals import seeds_half_width
from randlora_vision.training.harness.progress import smaller_is_better
from randlora_vision.training.harness.run_folder import RunFolder

Summary = Mapping[str, Any]
"""The content of a summary.json, with the path of its run folder as "folder"."""
Summaries = Mapping[str, Sequence[Summary]]
"""The summaries of each method, one per seed."""
LABELS: Mapping[str, str] = {
    "randlora": "RandLoRA",
    "lora": "LoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "nola": "NoLA",
    "full": "full fine-tuning",
    "linear-probe": "linear probe",
}


_SUBJECT = {
    "subject": "pictures of the subject recognised",
    "subject_likeness": "likeness to the subject",
    "loss": "loss on the subject",
}
_PRIOR = {
    "emoji_kept": "other emoji kept",
    "prior_likeness": "likeness of other prompts to the base",
    "prior_drift": "pixel drift of other prompts",
    "prior_loss": "loss on the class",
}
"""What DreamBooth measures of the subject, and of the rest, the most telling first."""


@dataclass(frozen=True)
class Column:
    """One figure of the compared runs.

    Attributes:
        name: What it was measured on; for DreamBooth, the figure itself.
        kind: What the figure is.
        metric: Its name in summary.json.
        test: The test that it belongs to; None for DreamBooth, which has one.
    """

    name: str
    kind: str
    metric: str
    test: str | None = None

    @property
    def title(self) -> str:
        """The head of the column."""
        return self.name if self.test is None else f"{self.name}, {self.kind}"

    def mean(self, runs: Sequence[Summary], when: Literal["before", "after"]) -> float | None:
        """Return the mean over the seeds; None for a new classifier, which was not measured before."""
        if any(run[when] is None for run in runs):
            return None
        return statistics.mean(self.values(runs, when))

    def values(self, runs: Sequence[Summary], when: Literal["before", "after"]) -> list[float]:
        """Return the figure of every seed."""
        return [(run[when] if self.test is None else run[when][self.test])[self.metric] for run in runs]

    def move(self, runs: Sequence[Summary]) -> str:
        """Return the figure before and after training; over several seeds its mean, with half the 95% interval."""
        share = not smaller_is_better(self.metric)
        before, after = self.mean(runs, "before"), self.values(runs, "after")

        def text(value: float) -> str:
            return f"{value:.1%}" if share else f"{value:.3g}"

        half = seeds_half_width(after) if len(runs) > 1 else 0.0
        width = (f" ± {100 * half:.1f}" if share else f" ± {half:.2g}") if len(runs) > 1 else ""
        return f"{'' if before is None else f'{text(before)} -> '}{text(statistics.mean(after))}{width}"


def columns(summary: Summary) -> list[Column]:
    """Return what is compared: the headline of every test; of DreamBooth, one figure of the subject and of the rest."""
    after = summary["after"]
    if "tasks" not in summary:
        chosen = [(part, next(name for name in part if name in after)) for part in (_SUBJECT, _PRIOR)]
        return [Column(part[metric], part[metric], metric) for part, metric in chosen]
    counts = {test: values.get("samples", values.get("images")) for test, values in after.items()}
    return [
        Column(f"{name} ({images_of(summary['splits'][test], counts[test])})", HEADLINES[metric], metric, test)
        for test, name in summary["tasks"].items()
        for metric in [next(metric for metric in HEADLINES if metric in after[test])]
    ]


def table(summaries: Summaries) -> str:
    """Return the comparison as a Markdown table whose columns also align in a terminal."""
    compared = columns(next(iter(summaries.values()))[0])
    rows = [["method", "trained numbers", "file (bytes)", *(column.title for column in compared), "training"]]
    for method, runs in summaries.items():
        numbers = [f"{runs[0]['trained_numbers']:,}", f"{runs[0]['file_bytes']:,}"]
        seconds = statistics.mean(run["seconds"] for run in runs)
        rows.append([LABELS[method], *numbers, *(column.move(runs) for column in compared), f"{seconds:.0f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw(folder: Path, summaries: Summaries) -> None:
    """Plot the figures of each method over the steps with the first seed, and the mean before and after training."""
    first = next(iter(summaries.values()))[0]
    measured = columns(first)
    compared = []
    for method, runs in summaries.items():
        moves = {
            column.name: (column.mean(runs, "before"), statistics.mean(column.values(runs, "after")))
            for column in measured
        }
        label = f"{LABELS[method]} ({runs[0]['trained_numbers']:,} trained)"
        compared.append(Compared(label, RunFolder(Path(runs[0]["folder"])).read_metrics(), moves))
    path = folder / "comparison.png"
    if "tasks" in first:
        name = next(iter(first["tasks"].values()))
        plot_comparison(compared, f"{first['model']} adapted to {name}", path)
    else:
        titles = {column.metric: column.name for column in measured}
        plot_measures(compared, titles, f"A subject taught to {first['model']}", path)
