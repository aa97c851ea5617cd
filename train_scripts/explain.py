"""Draw what each method of a comparison changed: updates, features, and the loss around the trained models.

python train_scripts/explain.py runs/demo

The folder is one of compare.py, or holds run folders of train_clip.py or train_classifier.py with the same model and
data. Writes PNG files and one self-contained page: singular values and effective ranks of the updates, the similarity
of features (CKA) to the base model's and to full fine-tuning's, and the training loss on the plane through LoRA,
RandLoRA and full fine-tuning.
"""

import argparse
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from randlora_vision.errors import user_errors
from randlora_vision.files.atomic import write_json, write_text
from randlora_vision.files.text import read_text
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.train_scripts import train_classifier, train_clip
from randlora_vision.training.classifier.models import load_classifier
from randlora_vision.training.classifier.options import ClassifierOptions
from randlora_vision.training.clip.classifier import ClipClassifier
from randlora_vision.training.clip.load import load_trained
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation import pictures_of_updates as draw
from randlora_vision.training.evaluation.comparison import LABELS
from randlora_vision.training.evaluation.results import headline
from randlora_vision.training.evaluation.updates import (
    Weights,
    block_features,
    blocks_with,
    cka,
    effective_rank,
    effective_weights,
    landscape,
    plane_through,
    updates,
    weights_of,
)
from randlora_vision.training.harness.options import parse
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.methods.adaptation import move
from randlora_vision.training.methods.peft import is_peft, load_peft

_PLANE = ("lora", "randlora", "full")


@dataclass(frozen=True)
class Subject:
    """The base model of the runs, with a sample of the training data.

    Attributes:
        model: The base model.
        adapted: (file of a run) -> a fresh base model with it.
        forward: (model) -> its answers to the sample, whose modules the features are taken from.
        loss: (model) -> the loss on the sample.
    """

    model: nn.Module
    adapted: Callable[[Path], nn.Module]
    forward: Callable[[nn.Module], Any]
    loss: Callable[[nn.Module], float]


def clip_subject(config: Path, samples: int) -> Subject:
    """Return the model and data of a run of train_clip.py."""
    options, skipped = parse(ClipOptions, ["--config", str(config)], ""), SkipList(None, False)
    data = train_clip.read_task(options, skipped)
    chosen = train_clip.choose_model(options)
    clip = train_clip.load(chosen, options, torch.device("cpu"))
    model = clip.model.eval()

    def adapted(path: Path) -> nn.Module:
        fresh = train_clip.load(chosen, options, torch.device("cpu")).model
        if load_trained(fresh, path) is not None:
            raise ValueError(
                f"{path} holds a linear classifier in the place of the class prompts: compare runs without"
            )
        return fresh

    if isinstance(data, ImageSplits):
        images, labels = _sample(data.select("train", clip.eval_transform, skipped), samples)
        templates = options.images.templates or ("a photo of a {}.",)

        def forward(model: nn.Module) -> Tensor:
            return ClipClassifier(replace(clip, model=model), data.class_names, templates).predict(images)

        return Subject(model, adapted, forward, lambda model: float(F.cross_entropy(forward(model), labels)))
    pairs = data.select("train", clip.eval_transform, clip.tokenize, skipped, draw=False)
    items = _items(pairs, samples)
    images, texts = (torch.stack([item[part] for item in items]) for part in (0, 1))

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        image, text = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
        return model.logit_scale.exp() * image @ text.T

    def loss(model: nn.Module) -> float:
        values, own = logits(model), torch.arange(len(images))
        return float((F.cross_entropy(values, own) + F.cross_entropy(values.T, own)) / 2)

    return Subject(model, adapted, logits, loss)


def classifier_subject(config: Path, samples: int) -> Subject:
    """Return the model and data of a run of train_classifier.py."""
    options, skipped = parse(ClassifierOptions, ["--config", str(config)], ""), SkipList(None, False)
    data, _ = train_classifier.read_images(options, skipped)
    chosen = train_classifier.choose_model(options)
    loaded = load_classifier(chosen, len(data.class_names), options.training.seed)
    images, labels = _sample(data.select("train", loaded.eval_transform, skipped), samples)

    def adapted(path: Path) -> nn.Module:
        fresh = load_classifier(chosen, len(data.class_names), options.training.seed).model
        tensors, metadata = read_tensors(path)
        if is_peft(metadata):
            return load_peft(fresh, path).merge_and_unload()
        if "format" in metadata:
            from randlora_vision.integrations.timm import load_adapter

            load_adapter(fresh, path)
        else:
            move(fresh, tensors, path)
        return fresh

    @torch.no_grad()
    def forward(model: nn.Module) -> Tensor:
        return model.eval()(images)

    return Subject(loaded.model, adapted, forward, lambda model: float(F.cross_entropy(forward(model), labels)))


def _sample(data: Any, samples: int) -> tuple[Tensor, Tensor]:
    items = _items(data, samples)
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def _items(data: Any, samples: int) -> list[Any]:
    """Return at most `samples` readable items of a data set, evenly spread."""
    chosen = (data[index] for index in _spread(len(data), samples))
    return [item for item in chosen if item is not None]


def _spread(number: int, samples: int) -> list[int]:
    """Return at most `samples` indices below `number`, evenly spread."""
    return [index * number // min(samples, number) for index in range(min(samples, number))]


def find_runs(folder: Path) -> dict[str, RunFolder]:
    """Return the first finished run of each method in a folder, by method; raise ValueError if there are none."""
    found: dict[str, RunFolder] = {}
    for path in sorted(folder.rglob("summary.json")):
        run = RunFolder(path.parent)
        if run.adapter.is_file() and {"clip", "model"} & _config(run).keys():
            found.setdefault(json.loads(read_text(path))["method"], run)
    found.pop("linear-probe", None)
    if not found:
        raise ValueError(f"{folder} holds no finished run of train_clip.py or train_classifier.py")
    configs = {method: _config(run) for method, run in found.items()}
    first = next(iter(configs.values()))
    for method, config in configs.items():
        for group in ("clip", "model", "images", "data"):
            if config.get(group) != first.get(group):
                raise ValueError(
                    f"{found[method].path} has another model or other data than {next(iter(found))}: {group}"
                )
    return {method: found[method] for method in LABELS if method in found}


def _config(run: RunFolder) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(read_text(run.config))


def explain(folder: Path, out: Path, samples: int, steps: int) -> None:
    """Write the pictures and the page."""
    runs = find_runs(folder)
    first = next(iter(runs.values()))
    make = clip_subject if "clip" in _config(first) else classifier_subject
    subject = make(first.config, samples)
    base = effective_weights(subject.model, dict(subject.model.named_parameters()))
    weights: dict[str, Weights] = {}
    for method, run in runs.items():
        print(f"reading {run.adapter}", flush=True)
        weights[method] = effective_weights(subject.adapted(run.adapter), base)
    changes = {method: updates(base, held) for method, held in weights.items()}
    common = [name for name in base if all(name in held for held in changes.values())]
    if not common:
        raise ValueError(f"{folder}: no weight was changed by all of {', '.join(runs)}")
    values = {
        method: {name: torch.linalg.svdvals(held[name].double()) for name in common} for method, held in changes.items()
    }
    draw.plot_spectra(values, out / "spectra.png")
    ranks = {
        method: {name: effective_rank(own) / len(own) for name, own in held.items()} for method, held in values.items()
    }
    draw.plot_ranks(ranks, out / "ranks.png")
    blocks = blocks_with(subject.model, common)
    features = {"base": block_features(subject.model, blocks, subject.forward)}
    for method, held in weights.items():
        with weights_of(subject.model, held):
            features[method] = block_features(subject.model, blocks, subject.forward)
    similarity: dict[str, dict[str, dict[str, float]]] = {
        other: {
            method: {block: cka(own, features[other][block]) for block, own in held.items()}
            for method, held in features.items()
            if method not in ("base", other)
        }
        for other in ("base", "full")
        if other in features
    }
    draw.plot_similarity(similarity, out / "features.png")
    grid: dict[str, Any] | None = None
    if set(_PLANE) <= set(weights):
        print(f"the loss at {steps * steps} points of the plane", flush=True)
        plane = plane_through(*(weights[method] for method in _PLANE))
        u, v, loss = landscape(plane, subject.model, subject.loss, steps)
        grid = {"u": u, "v": v, "loss": loss, "points": dict(zip(_PLANE, plane.points, strict=True))}
        draw.plot_landscape(u, v, loss, grid["points"], out / "landscape.png")
    else:
        print(f"no picture of the loss: it needs runs of {', '.join(_PLANE)}", flush=True)
    record = {"effective rank / narrow side": ranks, "CKA": similarity, "loss on the plane": grid}
    write_json(out / "explained.json", record)
    write_text(out / "index.html", page(out, runs, ranks, changes, base))
    print(f"written: {out}/index.html, explained.json and {len(list(out.glob('*.png')))} pictures")


def page(
    out: Path,
    runs: Mapping[str, RunFolder],
    ranks: Mapping[str, Mapping[str, float]],
    changes: Mapping[str, Weights],
    base: Weights,
) -> str:
    """Return the page, with the pictures inside it."""
    titles = ("method", "trained numbers", "result", "effective rank", "size of the update")
    rows = [f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"]
    for method, run in runs.items():
        summary = json.loads(read_text(run.summary))
        result = headline(next(iter(summary["after"].values())))
        rank = sum(ranks[method].values()) / max(1, len(ranks[method]))
        size = sum(float(held.norm() / base[name].norm()) for name, held in changes[method].items()) / len(
            changes[method]
        )
        cells = [LABELS[method], f"{summary['trained_numbers']:,}", f"{result:.1%}", f"{rank:.1%}", f"{size:.2%}"]
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    pictures = [
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{_base64(out / name)}">'
        for name, title in draw.TITLES.items()
        if (out / name).is_file()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What each method changed</title>'
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "td,th{padding:.2em 1em;text-align:right}td:first-child,th:first-child{text-align:left}</style>"
        f"<h1>What each method changed</h1><table>{''.join(rows)}</table>"
        "<p>Effective rank: mean over the adapted weights, relative to their narrow side. Size: mean of the norm of "
        f"the update over that of the weight.</p>{''.join(pictures)}</html>\n"
    )


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="explain.py", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--output-dir", type=Path, help="folder of the pictures; default: explained/ in the folder")
    parser.add_argument("--samples", type=int, default=128, help="training images for the features and the loss")
    parser.add_argument("--grid", type=int, default=15, help="points of a side of the picture of the loss")
    return parser


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs in a folder."""
    options = _parser().parse_args(argv)
    if options.samples < 3 or options.grid < 2:
        raise ValueError("--samples must be 3 or more, and --grid 2 or more")
    explain(options.folder, options.output_dir or options.folder / "explained", options.samples, options.grid)


if __name__ == "__main__":
    main()
