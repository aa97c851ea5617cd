"""Run the paper's tables: a row over methods, numbers of images, seeds and data sets; gather the results; check all.

python train_scripts/run_recipes.py run clip/ViT-B-32/both --data-root DIR --data dtd cars --shots 1 4 --seeds 0 1 2
python train_scripts/run_recipes.py gather
python train_scripts/run_recipes.py check

A stopped `run` goes on where it was when it is started again. Words after -- are options of the training script.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import write_text
from randlora_vision.files.text import read_text
from randlora_vision.train_scripts.compared import SCRIPTS, Comparison
from randlora_vision.training.data.known_data import known_data
from randlora_vision.training.evaluation.comparison import LABELS
from randlora_vision.training.evaluation.intervals import seeds_half_width
from randlora_vision.training.evaluation.results import headline
from randlora_vision.training.harness.command_line import without_rivals
from randlora_vision.training.harness.config_file import flags_of
from randlora_vision.training.harness.options import parse
from randlora_vision.training.methods.rivals import trained_numbers

RECIPES = Path(__file__).with_name("recipes")
IMAGES = ("1", "2", "4", "16", "50%", "100%")  # per class, or of all
_LR, _MIN_LR = 1e-3, 0.01  # of the methods that name no rate; of every rate, at the end
_FEW_SHOT_EPOCHS, _STEPS_OF_AN_EPOCH = 10, 10  # an epoch of few images is repeated until it has so many steps


@dataclass(frozen=True)
class DataSet:
    """One of the paper's data sets: a line of data.yaml."""

    name: str
    data: str
    classes: int
    epochs: float

    def length(self, images: str, batch_size: int) -> dict[str, float]:
        """Return the length of a run on so many images, as training options."""
        if images.endswith("%"):
            return {"epochs": self.epochs}
        batches = int(images) * self.classes / batch_size
        repeats = 1 if batches >= _STEPS_OF_AN_EPOCH else int(_STEPS_OF_AN_EPOCH / batches) + 1
        return {"steps": math.ceil(_FEW_SHOT_EPOCHS * repeats * batches)}


@dataclass(frozen=True)
class Row:
    """A model with its towers: what the tables have one row per method of."""

    name: str
    script: str
    options: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]

    def comparison(
        self,
        data: DataSet,
        images: str,
        root: str,
        folder: Path,
        methods: Sequence[str],
        seeds: Sequence[int],
        words: Sequence[str] = (),
    ) -> Comparison:
        """Return the runs of one data set; `words` are further options of the training script."""
        script = SCRIPTS[self.script]
        group = "images" if self.script == "clip" else "data"
        batch_size = self.options["training"]["batch_size"]
        part = {"train_fraction": float(images[:-1]) / 100} if images.endswith("%") else {"shots": int(images)}
        source = {"data": data.data.format(root=root), "data_root": root, **part}
        own = _merged(self.options, {group: source, "training": data.length(images, batch_size)})
        flags = without_rivals(flags_of(own, script.options), words)
        options = parse(script.options, [*flags, *words], "", script.flags)
        rates = {method: (float(settings.get("lr", _LR)),) for method, settings in self.methods.items()}
        settings = {
            method: {key: value for key, value in held.items() if key != "lr"} for method, held in self.methods.items()
        }
        place = folder / self.name / data.name / images.replace("%", "-percent")
        return Comparison(script, options, place, methods, seeds, rates, True, settings, final_rate=_MIN_LR)


def rows() -> dict[str, Row]:
    """Return every row of the recipes, by name."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        if path.stem == "data":
            continue
        recipe = _yaml(path)
        towers = recipe.get("towers") or {"": {}}
        for (model, row), (tower, settings) in product(recipe["rows"].items(), towers.items()):
            name = "/".join(part for part in (path.stem, model, tower) if part)
            options = _merged(recipe["options"], row["options"], settings)
            found[name] = Row(name, recipe["script"], options, row["methods"])
    return found


def data_sets() -> dict[str, DataSet]:
    """Return the data sets by name."""
    return {name: DataSet(name, **values) for name, values in _yaml(RECIPES / "data.yaml").items()}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(read_text(path))


def _merged(*groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return groups of options in which the later ones replace the earlier ones."""
    merged: dict[str, dict[str, Any]] = {}
    for part in groups:
        for group, values in part.items():
            merged[group] = {**merged.get(group, {}), **values}
    return merged


def run(own: argparse.Namespace) -> None:
    """Train a row on the chosen data sets."""
    row = rows()[own.row]
    methods = own.methods or list(row.methods)
    if wrong := [method for method in methods if method not in row.methods]:
        raise ValueError(f"--methods: {own.row} has no {wrong[0]}; it has {', '.join(row.methods)}")
    for name, images in product(own.data, own.images):
        data = data_sets()[name]
        print(f"\n##### {own.row}, {name}, {images}", flush=True)
        row.comparison(data, images, own.data_root, own.output_dir, methods, own.seeds, own.words).run()


def gather(own: argparse.Namespace) -> None:
    """Write the results that there are as one table per row: methods by numbers of images."""
    parts = [text for name, row in rows().items() if (text := table(own.output_dir, name, row))]
    if not parts:
        raise ValueError(f"{own.output_dir} holds no results of the recipes")
    write_text(own.output_dir / "results.md", "\n".join(parts))
    print("\n".join(parts))


def table(folder: Path, name: str, row: Row) -> str:
    """Return the mean accuracy over the data sets that all methods of a row have, with 95% intervals over seeds."""
    held = {
        (method, images): {
            data: scores
            for data in data_sets()
            if (scores := _scores(folder / name / data / images.replace("%", "-percent") / method))
        }
        for method, images in product(row.methods, IMAGES)
    }
    methods = [method for method in row.methods if any(held[method, images] for images in IMAGES)]
    if not methods:
        return ""
    lines = [f"| {name} | {' | '.join(IMAGES)} |", f"| --- |{' ---: |' * len(IMAGES)}"]
    common = {}
    for images in IMAGES:
        measured = [set(held[method, images]) for method in methods if held[method, images]]
        common[images] = set.intersection(*measured) if measured else set()
    for method in methods:
        cells = [
            _cell([held[method, images][data] for data in sorted(common[images]) if data in held[method, images]])
            for images in IMAGES
        ]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    counts = ", ".join(f"{images}: {len(found)}" for images, found in common.items() if found)
    return "\n".join([*lines, "", f"Data sets in the mean, by images per class or part: {counts}.", ""])


def _cell(scores: Sequence[Mapping[int, float]]) -> str:
    """Return the mean over data sets, with the interval over the seeds that all of them have."""
    seeds = sorted(set.intersection(*map(set, scores))) if scores else []
    if not seeds:
        return ""
    means = [100 * statistics.mean(held[seed] for held in scores) for seed in seeds]
    width = f" ± {seeds_half_width(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.1f}{width}"


def _scores(folder: Path) -> dict[int, float]:
    """Return the results of a method on one data set by seed."""
    import yaml

    found = {}
    for path in folder.rglob("summary.json"):
        after = json.loads(path.read_text(encoding="utf-8"))["after"]
        seed = yaml.safe_load(read_text(path.with_name("config.yaml")))["training"]["seed"]
        found[seed] = headline(next(iter(after.values())))
    return found


def check(own: argparse.Namespace) -> None:
    """Check every recipe offline: its model on the meta device, its targets, numbers, options and data sets."""
    for data in data_sets().values():
        _check_data(data)
    for name, row in rows().items():
        for method, images in product(row.methods, IMAGES):
            comparison = row.comparison(data_sets()["dtd"], images, "DIR", Path("runs"), [method], [0])
            comparison.given(method, comparison.rates[method][0], 0, {})
        numbers = ", ".join(f"{LABELS[method]} {number:,}" for method, number in numbers_of(row).items())
        print(f"{name}: {numbers}")
    print(f"{len(data_sets())} data sets, {len(rows())} rows: nothing is missing")


def numbers_of(row: Row) -> dict[str, int]:
    """Return how many numbers each method of a row trains, apart from a classifier; the model has no weights."""
    from randlora_vision import RandLoRAConfig, plan

    model, preset = _empty_model(row)
    report = plan(model, RandLoRAConfig(rank=row.methods["randlora"]["rank"], target_modules=preset))
    shapes = [target.shape for target in report.targets]
    numbers = {"randlora": sum(target.num_parameters for target in report.targets)}
    for method, settings in row.methods.items():
        if method in ("lora", "dora", "vera", "nola"):
            numbers[method] = trained_numbers(method, shapes, settings["rank"])
    return numbers


def _empty_model(row: Row) -> tuple[torch.nn.Module, str]:
    """Return the model of a row on the meta device, and the preset of what is adapted."""
    if row.script == "clip":
        import open_clip

        config = open_clip.get_model_config(row.options["clip"]["model"])
        if row.options["clip"]["pretrained"] not in open_clip.list_pretrained_tags_by_model(
            row.options["clip"]["model"]
        ):
            raise ValueError(f"{row.name}: open_clip has no weights {row.options['clip']['pretrained']}")
        with torch.device("meta"):
            return open_clip.CLIP(**config), f"open_clip:{row.options['clip']['towers']}"
    import timm

    with torch.device("meta"):
        model = timm.create_model(row.options["model"]["model"], img_size=row.options["model"]["img_size"])
    return model, "timm:backbone"


def _check_data(data: DataSet) -> None:
    """Raise ValueError unless the words of a data set are known and its source exists as far as one can see offline."""
    if known_data(data.data) is None:
        raise ValueError(f"{data.name}: no class names and templates are known for {data.data}")
    kind, _, name = data.data.partition(":")
    if kind == "torchvision":
        from torchvision import datasets

        if not hasattr(datasets, name):
            raise ValueError(f"{data.name}: torchvision has no {name}")


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="run_recipes.py", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train one row")
    one.add_argument("row", choices=rows(), metavar="ROW", help=", ".join(rows()))
    one.add_argument("--data-root", required=True, help="folder of torchvision's files and of the folders in data.yaml")
    one.add_argument(
        "--data", nargs="+", choices=data_sets(), default=list(data_sets()), metavar="NAME", help="data sets"
    )
    one.add_argument("--images", "--shots", nargs="+", choices=IMAGES, default=IMAGES, help="per class, or part of all")
    one.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of the row")
    one.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    one.set_defaults(command=run)
    all_of_them = commands.add_parser("gather", help="write the table of the results")
    all_of_them.set_defaults(command=gather)
    for command in (one, all_of_them):
        command.add_argument("--output-dir", type=Path, default=Path("runs/paper"), help="folder of the results")
    commands.add_parser("check", help="check every recipe offline").set_defaults(command=check)
    return parser


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    words = sys.argv[1:] if argv is None else list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own = _parser().parse_args(words[:cut])
    own.words = words[cut + 1 :]
    own.command(own)


if __name__ == "__main__":
    main()
