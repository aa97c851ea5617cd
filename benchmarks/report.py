"""Results as CSV files, Markdown tables and plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles

from benchmarks.methods import METHODS
from randlora_vision.figures import figure_file
from randlora_vision.files.atomic import write_text

_REFERENCES = {"peft_randlora": "PEFT RandLora", "peft_lora": "PEFT LoRA"}


@dataclass
class Result:
    """The cost of one method on one row; None if it was not measured."""

    row: str
    method: str
    trained: int
    flops: int
    step_seconds: list[float] | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    load_seconds: float | None = None
    inject_seconds: float | None = None

    @property
    def ddp_bytes(self) -> int:
        """Bytes of gradients that data-parallel training exchanges per step (float32)."""
        return 4 * self.trained


def ratios(result: Result, reference: Result) -> list[float] | None:
    """Return the ratios of the step time to that of a reference, round by round."""
    if result.step_seconds is None or reference.step_seconds is None:
        return None
    return [own / other for own, other in zip(result.step_seconds, reference.step_seconds, strict=True)]


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write one line per row and method, with step times only as ratios."""
    text = io.StringIO()
    names = [field.name for field in fields(Result) if field.name != "step_seconds"]
    writer = csv.writer(text)
    writer.writerow([*names, "ddp_bytes", *(f"step_time_to_{name}" for name in _REFERENCES)])
    by = _by_row(results)
    for result in results:
        times = [ratios(result, by[result.row][name]) for name in _REFERENCES]
        values = asdict(result)
        row = [values[name] for name in names]
        writer.writerow([*row, result.ddp_bytes, *(f"{median(time):.4f}" if time else "" for time in times)])
    write_text(path, text.getvalue())


def markdown(results: Sequence[Result]) -> str:
    """Return one table per row of the benchmark."""
    parts = []
    for row, methods in _by_row(results).items():
        rows = [_line(result, methods) for result in methods.values()]
        header = ["method", "trained", "GFLOPs", "of PEFT RandLora's", "of PEFT LoRA's"]
        header += ["step time to PEFT RandLora", "step time to PEFT LoRA", "kept for backward", "peak memory"]
        header += ["file", "load", "inject", "DDP bytes per step"]
        parts.append(f"### {row}\n\n{table([header, *rows])}")
    return "\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first row is its head; all but the first column are right-aligned."""
    head, *lines = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *lines))


def size_text(value: int | None) -> str:
    """Return a number of bytes as a text; "-" if it was not measured."""
    if value is None:
        return "-"
    return f"{value / 1e3:,.0f} KB" if value < 1e6 else f"{value / 1e6:,.1f} MB"


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot FLOPs and step time of every method as ratios to PEFT RandLora."""
    by = _by_row(results)
    height = 0.8 / len(METHODS)
    with figure_file(path, (13, 1.1 * len(by) + 1.5), "PEFT RandLora = 1", layout="constrained") as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for index, (name, method) in enumerate(METHODS.items()):
            places = [row + index * height for row in range(len(by))]
            own = [methods[name] for methods in by.values()]
            references = [methods["peft_randlora"] for methods in by.values()]
            flops = [a.flops / b.flops for a, b in zip(own, references, strict=True)]
            times = [median(ratios(a, b) or [float("nan")]) for a, b in zip(own, references, strict=True)]
            for axis, values in zip(axes, (flops, times), strict=True):
                axis.barh(places, values, height, label=method.title)
        for axis, title in zip(axes, ("FLOPs of a step", "step time"), strict=True):
            axis.axvline(1.0, color="grey", linewidth=0.8)
            axis.set_xlabel(title)
        axes[0].set_yticks([row + 0.4 - height / 2 for row in range(len(by))], list(by))
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))


def _by_row(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        rows.setdefault(result.row, {})[result.method] = result
    return rows


def _line(result: Result, methods: Mapping[str, Result]) -> list[str]:
    randlora, lora = methods["peft_randlora"], methods["peft_lora"]
    return [
        METHODS[result.method].title,
        f"{result.trained:,}",
        f"{result.flops / 1e9:,.1f}",
        f"{result.flops / randlora.flops:.2f}",
        f"{result.flops / lora.flops:.2f}",
        _spread(ratios(result, randlora)),
        _spread(ratios(result, lora)),
        size_text(result.kept_bytes),
        size_text(result.peak_bytes),
        size_text(result.file_bytes),
        _seconds(result.load_seconds),
        _seconds(result.inject_seconds),
        size_text(result.ddp_bytes),
    ]


def _spread(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    if len(values) < 3:
        return f"{median(values):.2f}"
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.2f} ({low:.2f}-{high:.2f})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
