"""One adapted layer at 1 to 65,536 tokens: FLOPs, time and kept bytes of every method and fixed order of products.

python -m benchmarks.tokens
python -m benchmarks.tokens --inputs 3072 --outputs 768

The planner's curve ("ours, auto") is never above the curves of the fixed orders.
"""

import argparse
import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import command_line, measure
from benchmarks.methods import METHODS, Apply, ours
from benchmarks.workloads import Layer
from randlora_vision.figures import figure_file
from randlora_vision.files.atomic import write_text

_RANK = 32


CURVES: dict[str, Apply] = {
    "full fine-tuning": METHODS["full"].apply,
    "PEFT LoRA": METHODS["peft_lora"].apply,
    "PEFT RandLora": METHODS["peft_randlora"].apply,
    "ours, always dense": ours("uniform", "dense"),
    "ours, always factored": ours("uniform", "factored"),
    "ours, auto": ours("uniform"),
    "ours, fewest bytes": ours("uniform", "memory"),
    "ours, structured": ours("structured"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and write the table and the plot."""
    parser = command_line.parser("tokens", __doc__)
    parser.add_argument("--outputs", type=int, default=3072, help="output features of the layer")
    parser.add_argument("--inputs", type=int, default=768, help="input features of the layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device for timing")
    parser.add_argument(
        "--timed-tokens", type=int, default=4096, help="larger numbers of tokens are counted, not timed"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    tokens = [2**power for power in range(17)]
    flops: dict[str, list[int]] = {name: [] for name in CURVES}
    times: dict[str, list[float]] = {name: [] for name in CURVES}
    kept: dict[str, list[int]] = {name: [] for name in CURVES}
    timed = [count for count in tokens if count <= options.timed_tokens]
    with tqdm(total=len(tokens) + len(timed), unit="point") as bar:
        meta = _trainees(options, torch.device("meta"))
        for count in tokens:
            for name, trainee in meta.items():
                trainee.inputs = _inputs(count, options.inputs, torch.device("meta"))
                flops[name].append(measure.flops(trainee))
            bar.update()
        real = _trainees(options, torch.device(options.device))
        for count in timed:
            for trainee in real.values():
                trainee.inputs = _inputs(count, options.inputs, torch.device(options.device))
            seconds = measure.step_times(real, options.rounds)
            for name in CURVES:
                kept[name].append(measure.kept_bytes(real[name]))
                pairs = zip(seconds[name], seconds["PEFT RandLora"], strict=True)
                times[name].append(median(own / other for own, other in pairs))
            bar.update()
    _write_csv(tokens, flops, times, kept, options.output_dir / "tokens.csv")
    shape = f"{options.inputs} to {options.outputs} features, rank {_RANK}"
    _plot(tokens, flops, timed, times, shape, options.output_dir / "tokens.png")
    print(verdict(tokens, flops))
    print(f"written: {options.output_dir}/tokens.csv, tokens.png")


def verdict(tokens: Sequence[int], flops: dict[str, list[int]]) -> str:
    """Return where the planner's curve is above that of a fixed order for the same bases, or that of PEFT, if it is."""
    others = ("ours, always dense", "ours, always factored", "PEFT RandLora")
    above = [
        f"{flops['ours, auto'][i] / flops[other][i]:.3f} times {other} at {count} tokens"
        for other in others
        for i, count in enumerate(tokens)
        if flops["ours, auto"][i] > flops[other][i]
    ]
    return "the planner's curve is above: " + "; ".join(above) if above else "the planner's curve is the lowest"


def _trainees(options: argparse.Namespace, device: torch.device) -> dict[str, measure.Trainee]:
    trainees = {}
    for name, apply in CURVES.items():
        torch.manual_seed(0)
        model = apply(Layer(options.inputs, options.outputs).requires_grad_(False), ["layer"], _RANK).to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        inputs = _inputs(1, options.inputs, device)
        trainees[name] = measure.Trainee(model, optimizer, inputs, lambda y: y.sum(), torch.float32)
    return trainees


def _inputs(tokens: int, features: int, device: torch.device) -> dict[str, Tensor]:
    return {"x": torch.randn(tokens, features, device=device, requires_grad=True)}


def _write_csv(
    tokens: Sequence[int],
    flops: dict[str, list[int]],
    times: dict[str, list[float]],
    kept: dict[str, list[int]],
    path: Path,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    kinds = ("FLOPs", "time", "bytes kept for backward")
    writer.writerow(["tokens", *(f"{kind}, {name}" for kind in kinds for name in flops)])
    for i, count in enumerate(tokens):
        timed = [f"{values[i]:.4f}" if i < len(values) else "" for values in times.values()]
        bytes_ = [values[i] if i < len(values) else "" for values in kept.values()]
        writer.writerow([count, *(values[i] for values in flops.values()), *timed, *bytes_])
    write_text(path, text.getvalue())


def _plot(
    tokens: Sequence[int],
    flops: dict[str, list[int]],
    timed: Sequence[int],
    times: dict[str, list[float]],
    shape: str,
    path: Path,
) -> None:
    with figure_file(path, (13, 5), f"PEFT RandLora = 1 ({shape})", layout="constrained") as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for name, values in flops.items():
            style = {"linestyle": "--"} if "always" in name else {}
            relative = [own / other for own, other in zip(values, flops["PEFT RandLora"], strict=True)]
            axes[0].plot(tokens, relative, label=name, **style)
            axes[1].plot(timed, times[name], label=name, **style)
        for axis, title in zip(axes, ("FLOPs of a step", "time of a step"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set(xlabel="tokens", title=title)
        axes[0].legend()


if __name__ == "__main__":
    main()
