"""The model card of a run: README.md in its folder, which the Hugging Face Hub shows as the page of the adapter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_vision.files.atomic import write_text
from randlora_vision.training.evaluation.comparison import LABELS
from randlora_vision.training.evaluation.curves import HEADLINES
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.versions import versions

_PICTURES = {
    "samples": "Samples over training",
    "predictions": "Predictions",
    "confusion": "Confusion",
    "curves": "Training",
    "scales": "Between base and adapted model",
}


@dataclass(frozen=True)
class Base:
    """The base model of a run."""

    library: str  # the library of the model: timm, open_clip or diffusers
    task: str  # what the model does, as the Hub calls it
    name: str  # the model as its library names it; that of a local folder without its path
    repository: str | None = None  # its repository on the Hub, if it came from there
    revision: str | None = None  # the commit or version of it, if known

    def record(self) -> dict[str, Any]:
        """Return the entry for summary.json."""
        return {"name": self.name, "repository": self.repository, "revision": self.revision}


def commit_of(repository: str, revision: str | None = None) -> str | None:
    """Return the commit that a revision of a repository was in the local cache, else the revision."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return revision
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    reference = folder / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision


def write_card(
    run: RunFolder,
    base: Base,
    data: str,
    training: Training,
    summary: Mapping[str, Any],
    code: Sequence[str],
    repository: str | None = None,
) -> None:
    """Write the card of a finished run; its `code` loads the adapter from the folder, or from `repository`."""
    import yaml

    name = (repository or run.path.resolve().name).rpartition("/")[2]
    front = {
        **({"base_model": base.repository, "base_model_relation": "adapter"} if base.repository else {}),
        "library_name": base.library,
        "pipeline_tag": base.task,
        "tags": [summary["method"], "randlora_vision", *(["adapter"] if summary["method"] != "full" else [])],
        "model-index": [
            {"name": name, "results": [_index(base, data, *test[:2]) for test in _tests(summary, "after")]}
        ],
    }
    source = f"[{base.name}](https://huggingface.co/{base.repository})" if base.repository else f"`{base.name}`"
    revision = f", revision `{base.revision}`" if base.revision else ""
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    lines += [f"A {_what(summary['method'])} for {source}{revision}, trained on {data}.", ""]
    lines += ["## Results", "", *_results(summary), "", "## Use", "", "```python"]
    lines += [*(at_hub(code, run, repository) if repository else code), "```", "", "## Training", ""]
    lines += ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in _training(training, summary))]
    for picture, title in _PICTURES.items():
        if (path := getattr(run, picture)).exists():
            lines += ["", f"## {title}", "", f"![{title}]({path.name})"]
    write_text(run.card, "\n".join(lines) + "\n")


def _what(method: str) -> str:
    """Return what a file of the method is."""
    paper = " ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987))" if method == "randlora" else ""
    return LABELS[method] + (f" adapter{paper}" if method not in ("full", "linear-probe") else "")


def at_hub(code: Sequence[str], run: RunFolder, repository: str) -> list[str]:
    """Return code that reads files of the run folder changed so that it reads those of a repository of the Hub."""
    lines = ["from huggingface_hub import hf_hub_download", *code]
    for path in (run.adapter, run.summary):
        lines = [line.replace(repr(str(path)), f"hf_hub_download({repository!r}, {path.name!r})") for line in lines]
    return [line.replace(repr(str(run.path)), repr(repository)) for line in lines]


_Test = tuple[str, Mapping[str, float], Mapping[str, Sequence[float]]]


def _tests(summary: Mapping[str, Any], when: str) -> Iterator[_Test]:
    """Yield the images of each test, its metrics and their intervals, for results of several tests or of DreamBooth."""
    results = summary[when] or {}
    confidence = summary.get("confidence", {}).get(when) or {}
    if all(isinstance(values, Mapping) for values in results.values()):
        tasks, splits = summary.get("tasks", {}), summary.get("splits", {})
        for name, values in results.items():
            split = splits.get(name, name)
            which = name if split == name else f"{name} ({split} images)"
            yield f"{tasks.get(name, name)}, {which}", values, confidence.get(name, {})
    else:
        losses = {name: value for name, value in results.items() if "loss" in name}
        drawn = {name: value for name, value in results.items() if name not in losses}
        yield from (
            (test, v, confidence) for test, v in (("training images", losses), ("generated pictures", drawn)) if v
        )


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the results before and after training, with their confidence intervals."""
    yield from ("| data | metric | before | after | 95% interval |", "|---|---|---:|---:|---|")
    before = {test: values for test, values, _ in _tests(summary, "before")}
    for test, values, intervals in _tests(summary, "after"):
        for name, value in values.items():
            was = _number(before[test][name], name) if name in before.get(test, {}) else ""
            low_high = " to ".join(_number(end, name) for end in intervals.get(name, ()))
            yield f"| {_cell(test)} | {name} | {was} | {_number(value, name)} | {low_high} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _number(value: float, name: str) -> str:
    proportion = name == "subject" or any(word in name for word in ("top", "recall", "_r1", "_r5", "kept"))
    return f"{value:.1%}" if proportion else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _index(base: Base, data: str, test: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return the entry of a test in the front matter: its headline, or else its first metric."""
    name = next((name for name in HEADLINES if name in values), next(iter(values)))
    metric = {"type": "accuracy" if name == "top1" else name, "name": HEADLINES.get(name, name), "value": values[name]}
    return {"task": {"type": base.task}, "dataset": {"name": test, "type": data}, "metrics": [metric]}


def _training(training: Training, summary: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "trained numbers", f"{summary['trained_numbers']:,}"
    yield "file", f"{summary['file_bytes']:,} bytes"
    yield "steps", summary["steps"]
    yield "images per step and process", training.batch_size * training.gradient_accumulation_steps
    yield "optimiser", f"{training.optimizer}, learning rate {training.lr:g}, weight decay {training.weight_decay:g}"
    yield "schedule", f"{training.schedule}, {training.warmup} steps of warmup"
    yield "precision", training.mixed_precision
    yield "seed", training.seed
    found = versions()
    shown = ("randlora_vision", "torch", "timm", "open_clip_torch", "diffusers")
    yield "packages", ", ".join(f"{name} {found[name]}" for name in shown if name in found)
