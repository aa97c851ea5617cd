"""Compare RandLoRA, LoRA with about as many trained parameters, and full fine-tuning of a CLIP model.

python train_scripts/compare_clip.py --output-dir runs/demo

Takes the options of train_clip.py and trains once per method, each run in a separate folder inside the output
folder. Results of an earlier comparison in that folder are overwritten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import write_json, write_text
from randlora_vision.train_scripts.train_clip import train
from randlora_vision.training.clip.defaults import DEFAULTS
from randlora_vision.training.clip.open_clip_flags import OPEN_CLIP
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipMethod, ClipOptions
from randlora_vision.training.evaluation.curves import Compared, plot_comparison
from randlora_vision.training.evaluation.results import headline
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder

Summaries = Mapping[ClipMethod, Mapping[str, Any]]  # method -> content of summary.json

_LABELS: Mapping[ClipMethod, str] = {"randlora": "RandLoRA", "lora": "LoRA", "full": "full fine-tuning"}
_REMARK = """\
Learning rates were chosen on validation images.
The gap between LoRA and RandLoRA reflects convergence within a short budget, not a limit of LoRA: in our trials
it was three points after these 250 steps and less than one after 600 (--steps 600).
Every method makes the base model forget part of what it could do before: see the original task, upright digits."""


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train with every method, then write and print the comparison."""
    options = parse(ClipOptions, argv, __doc__ or "", OPEN_CLIP, DEFAULTS.help())
    if options.adapter.method != "randlora" or options.training.lr is not None:
        raise ValueError(
            "the comparison runs every method, each with its own learning rate: leave --method and --lr out"
        )
    if options.evaluation.eval_only or options.evaluation.adapter is not None:
        raise ValueError("the comparison trains every method from the base model: leave --eval-only and --adapter out")
    if options.checkpoints.resume is not None:
        raise ValueError("the comparison trains from the start: to resume the run of one method, use train_clip.py")
    if options.hub.push_to_hub:
        raise ValueError("the comparison trains three adapters: to upload the run of one method, use train_clip.py")
    folder = Path(options.run.output_dir or "runs/compare-clip")
    summaries: dict[ClipMethod, Mapping[str, Any]] = {}
    for method, label in _LABELS.items():
        print(f"\n=== {label}", flush=True)
        adapter = options.adapter
        if method != "randlora":
            adapter = ClipAdapterOptions(method=method, target_modules=adapter.target_modules)
        if method == "lora":
            adapter = replace(adapter, budget=summaries["randlora"]["trained_numbers"])
        run = replace(options.run, output_dir=str(folder / method), overwrite=True)
        summaries[method] = train(replace(options, adapter=adapter, run=run))
    write_json(folder / "comparison.json", summaries)
    remark = f" {_REMARK}" if options.images.data is None else ""
    words = f"{table(summaries)}\n\nThe figures are those before and after training.{remark}\n"
    write_text(folder / "comparison.md", words)
    draw(folder, summaries)
    print(f"\n{words}\nresults: {folder}/comparison.png, comparison.md, comparison.json")
    print(f"run folders of the methods: {', '.join(str(folder / method) for method in _LABELS)}")


def table(summaries: Summaries) -> str:
    """Return the comparison as a Markdown table whose columns also align in a terminal."""
    tasks: Mapping[str, str] = summaries["randlora"]["tasks"]
    kind = "top-1" if "top1" in summaries["randlora"]["after"][next(iter(tasks))] else "mean recall"
    rows = [
        [
            "method",
            "trained numbers",
            "file (bytes)",
            *(f"{name}, {kind}" for name in measured(summaries["randlora"]).values()),
            "training",
        ]
    ]
    for method, summary in summaries.items():
        ends = [[headline(summary[when][task]) for when in ("before", "after")] for task in tasks]
        moves = [f"{before:.1%} -> {after:.1%}" for before, after in ends]
        numbers = [f"{summary['trained_numbers']:,}", f"{summary['file_bytes']:,}"]
        rows.append([_LABELS[method], *numbers, *moves, f"{summary['seconds']:.0f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def measured(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return, for every test of a run, its data and which and how many of its images were measured."""
    counts = {test: values.get("samples", values.get("images")) for test, values in summary["after"].items()}
    return {
        test: f"{name} ({counts[test]} {summary['splits'][test]} images)" for test, name in summary["tasks"].items()
    }


def draw(folder: Path, summaries: Summaries) -> None:
    """Plot the accuracy of each method over the steps, and before and after training."""
    first = summaries["randlora"]
    runs = [
        Compared(
            label=f"{_LABELS[method]} ({summary['trained_numbers']:,} trained)",
            metrics=RunFolder(folder / method).read_metrics(),
            accuracies={
                name: (headline(summary["before"][task]), headline(summary["after"][task]))
                for task, name in measured(summary).items()
            },
        )
        for method, summary in summaries.items()
    ]
    name = next(iter(first["tasks"].values()))
    plot_comparison(runs, f"{first['model']} adapted to {name}", folder / "comparison.png")


if __name__ == "__main__":
    main()
