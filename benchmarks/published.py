"""The figures that the README and docs/ show: collected from runs, and written into tables and pictures.

    make demo && python -m benchmarks.step --quick
    python -m benchmarks.published --demo runs/demo --step runs/benchmarks
    python -m benchmarks.published          # write the tables and pictures again from the committed results

`--demo` and `--step` take figures from the folders of these runs into benchmarks/results/; those of
`benchmarks.quality` are in its own results/. Tables stand between
``<!-- figures: NAME -->`` and ``<!-- end -->`` in Markdown files, and are replaced there; a test compares them.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import choosing, command_line
from benchmarks.report import size_text, table
from randlora_vision.files.atomic import write_json, write_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
IMAGES = ROOT / "docs" / "images"
_METHODS = {"randlora": "RandLoRA, rank 16", "lora": "LoRA of the same size", "full": "full fine-tuning"}
_COSTS = {
    "peft_randlora": "PEFT's RandLora",
    "ours_structured": "RandLoRA",
    "ours": "RandLoRA, uniform bases",
    "peft_lora": "PEFT's LoRA",
    "full": "full fine-tuning",
}
_ROWS = ("ViT-S/16, 4 images", "ViT-S/16, 16 images", "ViT-B/16, 64 images", "SDXL transformer block, 4096 tokens")
_MARKED = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, collect, and write."""
    parser = command_line.parser("published", __doc__)
    parser.add_argument("--demo", type=Path, help="the output folder of make demo")
    parser.add_argument("--step", type=Path, help="the output folder of benchmarks.step")
    options = parser.parse_args(argv)
    if options.demo:
        write_json(RESULTS / "demo.json", collect_demo(options.demo))
    if options.step:
        shutil.copy(options.step / "step.csv", RESULTS / "step.csv")
    for page in pages():
        write_text(page, filled(page.read_text(encoding="utf-8")))
    from benchmarks import pictures

    for name, draw in pictures.PICTURES.items():
        draw(IMAGES / name)


def pages() -> list[Path]:
    """Return the Markdown files that may hold tables of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Return a Markdown text with its tables of figures written anew."""
    return _MARKED.sub(lambda found: f"<!-- figures: {found[1]} -->\n{TABLES[found[1]]()}<!-- end -->", text)


def demo() -> dict[str, Any]:
    """Return the figures of the demo."""
    return json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))


def costs() -> dict[str, dict[str, dict[str, str]]]:
    """Return the lines of the step benchmark: row -> method -> column -> value."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    with (RESULTS / "step.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["row"].removesuffix(", attention+mlp"), {})[line["method"]] = line
    return found


def demo_table() -> str:
    """Return the table of the demo: accuracy on the new task and what is kept of the old one."""
    rows = [["method", "trained numbers", "file", "inverted digits 0-9", "upright digits 0-4"]]
    for method, figures in demo()["methods"].items():
        accuracies = [f"{figures['before'][task]:.1%} → {figures['after'][task]:.1%}" for task in ("test", "original")]
        size = f"{figures['file_bytes'] / 1e3:,.0f} KB"
        rows.append([_METHODS[method], f"{figures['trained_numbers']:,}", size, *accuracies])
    return table(rows)


def cost_table() -> str:
    """Return the cost of a training step and of a file for each method."""
    lines = costs()
    rows = [["", *_COSTS.values()]]
    for row in _ROWS:
        flops = {method: int(line["flops"]) for method, line in lines[row].items()}
        rows.append([f"FLOPs, {row}", *(f"{flops[method] / flops['peft_randlora']:.2f}" for method in _COSTS)])
    timed = lines[_ROWS[0]]
    for column, what in (("peak_bytes", "peak memory"), ("kept_bytes", "kept for backward")):
        values = [int(timed[method][column]) for method in _COSTS]
        rows.append([f"{what}, {_ROWS[0]}", *(f"{value / values[0]:.2f}" for value in values)])
    sizes = [int(timed[method]["file_bytes"]) for method in _COSTS]
    rows.append(["file, ViT-S/16", *(size_text(size) for size in sizes)])
    return table(rows)


def written_table(name: str) -> str:
    """Return the table that a benchmark has written to a file of the results."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("|"))


def dreambooth_table() -> str:
    """Return the peak memory of a DreamBooth run by option."""
    found = json.loads((RESULTS / "dreambooth.json").read_text(encoding="utf-8"))["rows"]
    rows = [["", "while texts and images are encoded", "while training", "by `--dry-run`, without activations"]]
    for name, row in found.items():
        rows.append([name, *(size_text(row[key]) for key in ("encoding", "training", "estimate"))])
    return table(rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "dreambooth": dreambooth_table,
    "demo": demo_table,
    "cost": cost_table,
    "clock": partial(written_table, "clock.md"),
    "floor": partial(written_table, "floor.md"),
    "methods": choosing.methods_table,
    "minus_lora": choosing.minus_lora_table,
    "budgets": choosing.budgets_table,
    "rates": choosing.rates_table,
    "variants": choosing.variants_table,
    "bases": choosing.bases_table,
    "grid": choosing.grid_table,
}


def collect_demo(folder: Path) -> dict[str, Any]:
    """Return what is shown of a run of compare.py, with the answers to one test image of each digit."""
    summaries = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "randlora" / "environment.json").read_text(encoding="utf-8"))
    methods = {
        method: {
            "trained_numbers": summary["trained_numbers"],
            "file_bytes": summary["file_bytes"],
            **{when: {task: summary[when][task]["top1"] for task in summary["tasks"]} for when in ("before", "after")},
            "interval": {task: summary["confidence"]["after"][task]["top1"] for task in summary["tasks"]},
        }
        for method, (summary, *_) in summaries.items()
    }
    first = summaries["randlora"][0]
    samples = {task: values["samples"] for task, values in first["after"].items()}
    versions = environment["packages"]
    return {
        "command": "make demo",
        "versions": {name: versions[name] for name in ("torch", "open_clip_torch")},
        "tasks": first["tasks"],
        "samples": samples,
        "methods": methods,
        "answers": _answers(folder / "randlora" / "adapter.safetensors"),
    }


def _answers(adapter: Path) -> list[dict[str, Any]]:
    import torch

    from randlora_vision import load_adapter
    from randlora_vision.demos.clip import demo_model_folder
    from randlora_vision.integrations._open_clip_models import load_clip
    from randlora_vision.training.clip.classifier import ClipClassifier
    from randlora_vision.training.data.sources import digits

    clip = load_clip(f"local-dir:{demo_model_folder()}", None, seed=0)
    data = digits.read_digits(inverted=True)
    chosen = [data.labels["test"].index(digit) for digit in range(10)]
    pixels = torch.stack([clip.eval_transform(data.images["test"][index]) for index in chosen])
    base = ClipClassifier(clip, digits.NAMES, digits.TEMPLATES).predict(pixels).argmax(dim=1).tolist()
    load_adapter(clip.model, adapter)
    adapted = ClipClassifier(clip, digits.NAMES, digits.TEMPLATES).predict(pixels).argmax(dim=1).tolist()
    return [
        {"test_image": index, "digit": digit, "base": before, "adapted": after}
        for digit, (index, before, after) in enumerate(zip(chosen, base, adapted, strict=True))
    ]


if __name__ == "__main__":
    main()
