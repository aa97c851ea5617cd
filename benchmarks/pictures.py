"""The pictures of the README and docs/: drawn from committed results and from the method itself."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks import published
from randlora_vision import RandLoRAConfig, adapter_parameters, count_parameters, inject
from randlora_vision.figures import figure_file

_GREEN, _RED, _GREY = "#2e8b57", "#c0392b", "#bbbbbb"


def overview(path: Path) -> None:
    """Draw what the demo shows: answers before and after, accuracies, sizes and costs."""
    from randlora_vision.training.data.sources import digits

    results, costs = published.demo(), published.costs()
    pictures = digits.read_digits(inverted=True).images["test"]
    with figure_file(path, (11.5, 4.2), "A CLIP that knows upright digits 0-4 learns inverted digits 0-9") as figure:
        grid = figure.add_gridspec(2, 8, left=0.02, right=0.97, top=0.8, bottom=0.1, wspace=0.15, hspace=0.55)
        for number, answer in enumerate(results["answers"]):
            axes = figure.add_subplot(grid[number // 5, number % 5])
            axes.imshow(pictures[answer["test_image"]])
            axes.set_axis_off()
            for place, given in ((-0.14, "base"), (-0.3, "adapted")):
                right = answer[given] == answer["digit"]
                text = f"{given}: {digits.NAMES[answer[given]]} {'✓' if right else '✗'}"
                colour = _GREEN if right else _RED
                axes.text(0.5, place, text, transform=axes.transAxes, ha="center", fontsize=7.5, color=colour)
        _bars(figure.add_axes((0.69, 0.5, 0.3, 0.3)), results)
        _facts(figure.add_axes((0.62, 0.03, 0.37, 0.36)), results, costs)


def _bars(axes: Axes, results: Mapping) -> None:
    methods = results["methods"]
    labels = ["base", "full", "LoRA", "RandLoRA"]
    values = [methods["full"]["before"]["test"], *(methods[name]["after"]["test"] for name in ("full", "lora"))]
    values.append(methods["randlora"]["after"]["test"])
    bars = axes.barh(labels, values, color=[_GREY, "C2", "C1", "C0"], height=0.7)
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
    axes.set(xlim=(0, 1.18), title="Accuracy on the new task")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="y", visible=False)


def _facts(axes: Axes, results: Mapping, costs: Mapping) -> None:
    """Draw the table of sizes (of the demo) and costs (of a ViT-S/16)."""
    axes.set_axis_off()
    methods, timed = results["methods"], costs["ViT-S/16, 4 images"]
    flops = {name: int(line["flops"]) for name, line in costs["ViT-S/16, 16 images"].items()}
    names = {"randlora": "ours_structured", "lora": "peft_lora", "full": "full"}
    rows = [
        ["trained numbers", *(f"{methods[name]['trained_numbers']:,}" for name in names)],
        ["file", *(f"{methods[name]['file_bytes'] / 1e3:,.0f} KB" for name in names)],
        ["FLOPs of a step (ViT-S/16)*", *(f"{flops[own] / flops['full']:.2f}" for own in names.values())],
        [
            "peak memory (ViT-S/16)*",
            *(f"{int(timed[own]['peak_bytes']) / int(timed['full']['peak_bytes']):.2f}" for own in names.values()),
        ],
    ]
    table = axes.table(
        rows, colLabels=["", "RandLoRA", "LoRA", "full"], loc="center", cellLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.25)
    for (_, column), cell in table.get_celld().items():
        cell.set_edgecolor("#dddddd")
        cell.set_width(0.43 if column == 0 else 0.19)
        if column == 0:
            cell.set_text_props(ha="left")
    axes.text(1.0, -0.06, "* full fine-tuning = 1", transform=axes.transAxes, ha="right", fontsize=7, color="#666666")


def spectra(path: Path) -> None:
    """Draw the singular values of random updates: LoRA's end at its rank, RandLoRA's do not."""
    narrow, wide = 96, 384
    generator = torch.Generator().manual_seed(0)
    with figure_file(path, (6.4, 3.6), "Singular values of an update of 384 x 96", layout="constrained") as figure:
        axes = figure.subplots()
        for number, rank in enumerate((8, 24)):
            layer = torch.nn.Linear(narrow, wide)
            inject(layer, RandLoRAConfig(rank=rank, target_modules=["weight"]))
            with torch.no_grad():
                for _, tensor in adapter_parameters(layer):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                update = layer.weight - layer.base_weight()  # type: ignore[operator]
                values = torch.linalg.svdvals(update)
            label = f"RandLoRA, rank {rank}: {count_parameters(layer)[0]:,} trained"
            axes.plot(range(1, narrow + 1), values / values[0], color=f"C{number}", label=label)
        for number, rank in enumerate((3, 1), 2):
            product = torch.randn(wide, rank, generator=generator) @ torch.randn(rank, narrow, generator=generator)
            values = torch.linalg.svdvals(product)
            label = f"LoRA, rank {rank}: {rank * (wide + narrow):,} trained"
            shares = [float(value / values[0]) for value in values[:rank]] + [0.0] * (narrow - rank)
            axes.plot(range(1, narrow + 1), shares, color=f"C{number}", linestyle="--", label=label)
        axes.set(xlabel="index", ylabel="singular value / largest one", ylim=(-0.02, 1.05))
        axes.legend()


def numbers(path: Path) -> None:
    """Draw how many numbers are trained for a square weight, against the rank."""
    narrow = 768
    ranks = torch.arange(4, 257)
    bases = torch.ceil(narrow / ranks)
    with figure_file(path, (6.4, 3.4), "Trained numbers of a weight of 768 x 768", layout="constrained") as figure:
        axes = figure.subplots()
        axes.plot(ranks, bases * (ranks + narrow), label="RandLoRA: N (R + m), N = ⌈m / R⌉")
        axes.plot(ranks, 2 * ranks * narrow, label="LoRA: R (m + M)")
        axes.axhline(narrow**2, color="C2", linestyle=":", label="full fine-tuning: m M")
        axes.set(xlabel="rank R", ylabel="trained numbers", yscale="log")
        axes.legend()


PICTURES: Mapping[str, Callable[[Path], None]] = {
    "overview.png": overview,
    "spectra.png": spectra,
    "numbers.png": numbers,
}
