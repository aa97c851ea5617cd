"""The table and the picture of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from randlora_vision.training.evaluation import comparison
from randlora_vision.training.evaluation.comparison import columns, draw, table
from randlora_vision.training.harness.run_folder import RunFolder

NUMBERS = {"trained_numbers": 1000, "file_bytes": 4000, "seconds": 3.0, "model": "a model"}


def cells(summaries: dict[str, Any]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table(summaries).splitlines()]


def test_classes_over_two_seeds() -> None:
    def run(before: float | None, after: float) -> dict[str, Any]:
        results = None if before is None else {"test": {"top1": before, "samples": 40}}
        found = {"before": results, "after": {"test": {"top1": after, "samples": 40}}}
        return {**NUMBERS, **found, "tasks": {"test": "digits"}, "splits": {"test": "test"}}

    head, _, first, second = cells({"randlora": [run(0.1, 0.5), run(0.1, 0.7)], "lora": [run(None, 0.4)]})
    assert head == [
        "method",
        "trained numbers",
        "file (bytes)",
        "digits (40 test images), top-1 accuracy",
        "training",
    ]
    # t(0.975) with one degree of freedom times the standard error: 12.706 * 0.1414 / sqrt(2)
    assert first == ["RandLoRA", "1,000", "4,000", "10.0% -> 60.0% ± 127.1", "3 s"]
    assert second[3] == "40.0%"


@pytest.mark.parametrize(
    ("figures", "subject", "rest"),
    [
        (
            {"loss": (0.5, 0.25), "prior_loss": (0.125, 0.5)},
            ("loss on the subject", "0.5 -> 0.25"),
            ("loss on the class", "0.125 -> 0.5"),
        ),
        (
            {"loss": (0.5, 0.25), "prior_loss": (0.1, 0.5), "prior_drift": (0.0, 0.0625)},
            ("loss on the subject", "0.5 -> 0.25"),
            ("pixel drift of other prompts", "0 -> 0.0625"),
        ),
        (
            {"loss": (1, 1), "prior_drift": (0, 1), "prior_likeness": (1.0, 0.75), "subject_likeness": (0.25, 0.5)},
            ("likeness to the subject", "25.0% -> 50.0%"),
            ("likeness of other prompts to the base", "100.0% -> 75.0%"),
        ),
        (
            {"loss": (1, 1), "prior_drift": (0, 1), "subject": (0.0, 0.875), "emoji_kept": (1.0, 0.5)},
            ("pictures of the subject recognised", "0.0% -> 87.5%"),
            ("other emoji kept", "100.0% -> 50.0%"),
        ),
    ],
)
def test_dreambooth_has_one_figure_of_the_subject_and_one_of_the_rest(
    figures: dict[str, tuple[float, float]],
    subject: tuple[str, str],
    rest: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after = ({name: pair[when] for name, pair in figures.items()} for when in (0, 1))
    folder = RunFolder(tmp_path)
    lines = [{"step": step, "split": "eval", **values} for step, values in ((0, before), (5, after))]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summaries = {"full": [{**NUMBERS, "before": before, "after": after, "folder": str(tmp_path)}]}
    head, _, row = cells(summaries)
    assert list(zip(head, row, strict=True))[3:5] == [subject, rest]
    drawn = []
    monkeypatch.setattr(comparison, "plot_measures", lambda *given: drawn.append(given))
    draw(tmp_path, summaries)
    ((runs, titles, title, path),) = drawn
    assert list(titles.values()) == [subject[0], rest[0]] and path == tmp_path / "comparison.png"
    assert title == "A subject taught to a model" and runs[0].label == "full fine-tuning (1,000 trained)"
    assert [column.metric for column in columns(summaries["full"][0])] == list(titles)
