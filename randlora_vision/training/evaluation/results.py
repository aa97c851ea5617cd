"""Results of a run: the parts of summary.json and of the printed summary that scripts share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from randlora_vision.names import counted
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.accuracy import Scores
from randlora_vision.training.evaluation.curves import HEADLINES, plot_confusion
from randlora_vision.training.evaluation.grids import Prediction, plot_predictions
from randlora_vision.training.evaluation.intervals import intervals, wilson
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed
from randlora_vision.training.methods.adaptation import Adaptation

Results = Mapping[str, Mapping[str, float]]  # test name -> metric name -> value


def log_results(run: RunFolder, before: Results | None, after: Results, steps: int) -> None:
    """Log the results on the tests before training, at step 0, and after it."""
    for step, results in ((0, before or {}), (steps, after)):
        for name, values in results.items():
            run.log(step, name, values)


def plot_results(
    run: RunFolder, predictions: Sequence[Prediction], scores: Scores, names: Sequence[str], task: str, when: str
) -> None:
    """Plot the sample with its predictions, and the confusion of all images of the task ("test" or "validation")."""
    measured = int(scores.values["samples"])
    shown = f"{len(predictions)} of the {measured} {task}" if len(predictions) < measured else task.capitalize()
    plot_predictions(predictions, f"{shown} images {when}", run.predictions)
    title = f"Predictions on the {task} images, top-1 {scores.values['top1']:.1%}"
    plot_confusion(scores.confusion.tolist(), names, title, run.confusion)


@dataclass(frozen=True)
class Measured:
    """The results of a model on the tests."""

    tasks: Mapping[str, str]  # test -> name of its data
    splits: Mapping[str, str]  # test -> which of its images were measured: "test", "validation", "train" or "all"
    scores: Mapping[str, Scores]  # for the tests with classes
    logits: Tensor  # for the sample of P pictures (P, K)

    @property
    def results(self) -> Results:
        """The metrics of each test."""
        return {name: scores.values for name, scores in self.scores.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{self.tasks[name]}, {self.splits[name]} images: {_words(values)}" for name, values in self.results.items()
        )


def summarise(
    run: RunFolder,
    method: str,
    model: str,
    adaptation: Adaptation,
    speed: Speed,
    reload_difference: float,
    skipped: SkipList,
) -> dict[str, Any]:
    """Return the part of summary.json on what was trained, the speed, and the check of the reloaded file."""
    return {
        "method": method,
        "model": model,
        "trained_numbers": sum(parameter.numel() for _, parameter in adaptation.parameters()),
        "file_bytes": run.adapter.stat().st_size,
        "steps": speed.steps,
        "seconds": round(speed.seconds, 2),
        "images_per_second": round(speed.images_per_second, 1),
        "peak_memory_gb": round(speed.peak_memory, 2),
        "reload_difference": reload_difference,
        "skipped_images": skipped.count(),
        "changed": skipped.changes(),
    }


def task_name(split: str) -> str:
    """Return the name of the results of the task, for the split that they were measured on."""
    return {"val": "validation"}.get(split, split)


def confidence(results: Mapping[str, Results | None]) -> dict[str, Any]:
    """Return, for summary.json, the 95% interval of every proportion in the results before and after training."""
    return {
        "confidence": {
            when: found and {name: intervals(values) for name, values in found.items()}
            for when, found in results.items()
        }
    }


def headline(values: Mapping[str, float]) -> float:
    """Return the headline metric of a test: top-1, or the mean recall."""
    return next(values[name] for name in HEADLINES if name in values)


def _words(values: Mapping[str, float]) -> str:
    if "top1" in values:
        low, high = wilson(values["top1"], int(values["samples"]))
        images = counted(values["samples"], "image")
        return f"top-1 {values['top1']:.1%} (95% interval {low:.1%} to {high:.1%}, {images})" + (
            f", top-5 {values['top5']:.1%}" if "top5" in values else ""
        )
    ways = []
    for way in ("image_to_text", "text_to_image"):
        recalls = [f"{value:.1%}" for name, value in values.items() if name.startswith(f"{way}_r")]
        ways.append(f"{way.replace('_', ' ')} {'/'.join(recalls)}")
    sizes = (counted(values[f"{kind}s"], kind) for kind in ("image", "caption"))
    return f"recall@1/5/10 {', '.join(ways)} ({', '.join(sizes)})"


def closing_words(
    run: RunFolder,
    before: object,
    after: object,
    summary: Mapping[str, Any],
    code: Sequence[str],
    same: str = "a fresh base model, it gives equal outputs (largest difference of a logit",
) -> str:
    """Return the printed summary: the results, the file, the check of the reload, and the loading code."""
    n = summary["skipped_images"]
    return "\n".join(
        [
            f"\nbefore: {before}",
            f"after:  {after}",
            f"trained {summary['trained_numbers']:,} numbers for {summary['seconds']:.0f} s at "
            f"{summary['images_per_second']:.0f} images/s",
            f"saved {run.adapter} ({summary['file_bytes']:,} bytes); loaded into {same}: "
            f"{summary['reload_difference']:.1e})",
            *([f"WARNING: {summary['warning']}"] if summary.get("warning") else []),
            *([f"skipped {counted(n, 'unreadable image')}, listed in {run.skipped}"] if n else []),
            *(f"changed {n} images or labels: {rule}" for rule, n in summary["changed"].items()),
            "\nTo use it:",
            *(f"    {line}" for line in code),
            *([f"\npictures: {run.samples}"] if run.samples.exists() else []),
            f"\nresults: {run.path}",
        ]
    )


def check_equal(reloaded: Tensor, trained: Tensor, run: RunFolder) -> float:
    """Return the largest difference between both models' logits; raise RuntimeError if it exceeds rounding."""
    difference = (reloaded - trained).abs().max().item()
    if not difference <= 1e-4 * trained.abs().max().item():  # NaN is a difference too
        raise RuntimeError(f"{run.adapter} does not reproduce the trained model: a logit differs by {difference}")
    return difference
