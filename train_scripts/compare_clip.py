"""RandLoRA, LoRA with as many trained numbers, and full fine-tuning of a CLIP model, side by side.

python train_scripts/compare_clip.py --output-dir runs/demo

Takes the options of train_clip.py and trains once per method, each in its own folder inside the output
folder; what an earlier comparison left there is replaced.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.training.clip_options import ClipOptions
from randlora_vision.training.errors import user_errors
from randlora_vision.training.files import write_json, write_text
from randlora_vision.training.options import AdapterOptions, Method, parse
from randlora_vision.training.plots import Compared, plot_comparison
from randlora_vision.training.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))  # also where this file is not what was started
from train_clip import train  # noqa: E402

Summaries = Mapping[Method, Mapping[str, Any]]  # by method, what summary.json holds

_LABELS: Mapping[Method, str] = {"randlora": "RandLoRA", "lora": "LoRA", "full": "full fine-tuning"}
_TASKS = {"test": "new task", "original": "original task"}
_REMARK = """\
Accuracies are of test images; learning rates were chosen on validation images. The distance between LoRA and
RandLoRA is one of convergence within a short budget, no ceiling: it closes with a longer schedule (--steps 600).
The original task is what the base model could do before: training on the new one makes every method forget it."""


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train by every method, then write and print the comparison."""
    options = parse(ClipOptions, argv, __doc__ or "")
    if options.adapter.method != "randlora" or options.training.lr is not None:
        raise ValueError("the comparison runs every method, each with its own rate: leave --method and --lr out")
    folder = Path(options.run.output_dir or "runs/compare-clip")
    summaries: dict[Method, Mapping[str, Any]] = {}
    for method, label in _LABELS.items():
        print(f"\n=== {label}", flush=True)
        adapter = options.adapter
        if method != "randlora":
            adapter = AdapterOptions(method=method, target_modules=adapter.target_modules)
        if method == "lora":
            adapter = replace(adapter, budget=summaries["randlora"]["trained_numbers"])
        run = replace(options.run, output_dir=str(folder / method), overwrite=True)
        summaries[method] = train(replace(options, adapter=adapter, run=run))
    write_json(folder / "comparison.json", summaries)
    write_text(folder / "comparison.md", f"{table(summaries)}\n\n{_REMARK}\n")
    draw(folder, summaries)
    print(f"\n{table(summaries)}\n\n{_REMARK}\n\nresults: {folder}/comparison.png, comparison.md, comparison.json")
    print(f"and for each method its run folder: {', '.join(str(folder / method) for method in _LABELS)}")


def table(summaries: Summaries) -> str:
    """Return the comparison as a Markdown table, aligned for the terminal too."""
    tasks = [task for task in _TASKS if task in summaries["randlora"]["before"]]
    rows = [["method", "trained numbers", "file (bytes)", *(f"{_TASKS[t]}, top-1" for t in tasks), "training"]]
    for method, summary in summaries.items():
        moves = [f"{summary['before'][t]['top1']:.1%} -> {summary['after'][t]['top1']:.1%}" for t in tasks]
        numbers = [f"{summary['trained_numbers']:,}", f"{summary['file_bytes']:,}"]
        rows.append([_LABELS[method], *numbers, *moves, f"{summary['seconds']:.0f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw(folder: Path, summaries: Summaries) -> None:
    """Draw the methods' accuracies over the steps, and before and after."""
    runs = [
        Compared(
            label=f"{_LABELS[method]} ({summary['trained_numbers']:,} trained)",
            metrics=RunFolder(folder / method).read_metrics(),
            accuracies={
                _TASKS[task]: (values["top1"], summary["after"][task]["top1"])
                for task, values in summary["before"].items()
            },
        )
        for method, summary in summaries.items()
    ]
    plot_comparison(runs, f"Adapting {summaries['randlora']['model']}", folder / "comparison.png")


if __name__ == "__main__":
    main()
