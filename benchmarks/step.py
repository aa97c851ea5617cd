"""One training step with five methods, compared in one run: FLOPs, time, memory, file size.

python -m benchmarks.step --quick

Full fine-tuning, PEFT's LoRA and RandLora, and RandLoRA with dense and structured bases are applied to the
same layers; the adapters have (nearly) the same number of trained numbers. The steps are timed in turn. FLOPs
are those of the matrix products, counted by torch.utils.flop_counter. Rows that would take too long on this
machine are counted on the meta device and not timed.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import command_line, measure
from benchmarks.expectations import verdicts
from benchmarks.methods import METHODS
from benchmarks.report import Result, markdown, plot, write_csv
from benchmarks.workloads import WORKLOADS, Row, full_rows, quick_rows
from randlora_vision.files.atomic import write_text


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and write the tables and the plot."""
    options = _parser().parse_args(argv)
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    device = torch.device(options.device)
    if options.timed_gflops is None:
        options.timed_gflops = float("inf") if device.type == "cuda" else 120.0 if options.quick else 2000.0
    rows = list(quick_rows() if options.quick else full_rows())
    if options.workloads:
        rows = [row for row in rows if row.workload in options.workloads]
    if options.sizes:
        rows = [row for row in rows if row.size in options.sizes]
    if options.targets:
        rows = [row for row in rows if row.which == options.targets]
    if not rows:
        raise SystemExit("no rows match: --help lists the models, and benchmarks/workloads.py lists their sizes")
    results: list[Result] = []
    with tqdm(total=len(rows) * len(METHODS), unit="method") as bar:
        for row in rows:
            bar.set_postfix_str(row.title)
            results += _measure_row(row, options, device, bar)
            _write(results, options.output_dir, device)  # after every row, so that an interrupted run keeps its results
    print(markdown(results))
    print("\n".join(verdicts(results)))
    print(f"\nwritten: {options.output_dir}/step.csv, step.md, step.png")


def _measure_row(row: Row, options: argparse.Namespace, device: torch.device, bar: tqdm) -> list[Result]:
    torch.manual_seed(0)
    base = WORKLOADS[row.workload].build()
    dtype = getattr(torch, options.dtype)
    counted = {name: measure.uncomputed(row, base, name) for name in METHODS}
    flops = {name: measure.flops(trainee) for name, trainee in counted.items()}
    if flops["full"] > options.timed_gflops * 1e9:
        bar.update(len(METHODS))
        return [Result(row.title, name, measure.trained(counted[name]), flops[name]) for name in METHODS]
    trainees, results = {}, []
    for name in METHODS:
        trainees[name], seconds = measure.prepare(row, base, name, device, dtype)
        results.append(Result(row.title, name, measure.trained(trainees[name]), flops[name], inject_seconds=seconds))
    times = measure.step_times(trainees, options.rounds)
    for result in results:
        trainee = trainees[result.method]
        result.step_seconds = times[result.method]
        result.kept_bytes = measure.kept_bytes(trainee)
        result.file_bytes, result.load_seconds = measure.saved_bytes_and_load_time(trainee, base, result.method)
    del trainees, trainee
    for result in results:
        if not options.no_peak:
            result.peak_bytes = measure.peak_memory(row, result.method, device, dtype)
        bar.update()
    return results


def _write(results: list[Result], folder: Path, device: torch.device) -> None:
    write_csv(results, folder / "step.csv")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = f"# One training step, side by side\n\n{name}, torch {torch.__version__}.\n\n"
    write_text(folder / "step.md", head + markdown(results) + "\n" + "\n".join(verdicts(results)) + "\n")
    plot(results, folder / "step.png")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("step", __doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="only a few rows, in less than three minutes on two cores")
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), help="only these models")
    parser.add_argument("--sizes", nargs="+", type=int, help="only these numbers of images, pairs or tokens")
    parser.add_argument("--targets", choices=("attention", "attention+mlp"), help="only these adapted layers")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="device for timing")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16" if on_gpu else "float32",
        help="dtype of the matrix products (autocast)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument(
        "--timed-gflops",
        type=float,
        help="rows whose full fine-tuning step has more GFLOPs are counted but not timed; default: 2000 on a CPU "
        "(120 with --quick), no limit on a GPU",
    )
    parser.add_argument("--no-peak", action="store_true", help="skip peak memory (a fresh process per method)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="folder for the tables")
    return parser


if __name__ == "__main__":
    main()
