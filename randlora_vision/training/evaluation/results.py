"""Results of a run: the parts of summary.json and of the printed summary that scripts share."""

from collections.abc import Mapping, Sequence
from typing import Any

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.intervals import intervals, wilson
from randlora_vision.training.evaluation.plots import HEADLINES
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed
from randlora_vision.training.methods.adaptation import Adaptation

Results = Mapping[str, Mapping[str, float]]  # test name -> metric name -> value


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


def in_words(tasks: Mapping[str, str], results: Results) -> str:
    """Return the accuracies or recalls of each test as text, labelled by its task; the first says which images."""
    first = next(iter(results))
    labels = {name: f"{task}, {name} images:" if name == first else task for name, task in tasks.items()}
    return "; ".join(f"{labels[name]} {_words(values)}" for name, values in results.items())


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
        return (
            f"top-1 {values['top1']:.1%} (95% interval {low:.1%} to {high:.1%}, {values['samples']} images), "
            f"top-5 {values['top5']:.1%}"
        )
    ways = []
    for way in ("image_to_text", "text_to_image"):
        recalls = [f"{value:.1%}" for name, value in values.items() if name.startswith(f"{way}_r")]
        ways.append(f"{way.replace('_', ' ')} {'/'.join(recalls)}")
    return f"recall@1/5/10 {', '.join(ways)} ({values['images']} images, {values['captions']} captions)"


def closing_words(run: RunFolder, before: object, after: object, summary: dict[str, Any], code: Sequence[str]) -> str:
    """Return the printed summary: accuracies, the file, the check of the reload, and the loading code."""
    return "\n".join(
        [
            f"\nbefore: {before}",
            f"after:  {after}",
            f"trained {summary['trained_numbers']:,} numbers for {summary['seconds']:.0f} s at "
            f"{summary['images_per_second']:.0f} images/s",
            f"saved {run.adapter} ({summary['file_bytes']:,} bytes); loaded into a fresh base model, it gives equal "
            f"outputs (largest difference of a logit: {summary['reload_difference']:.1e})",
            *([f"skipped {n} unreadable images, listed in {run.skipped}"] if (n := summary["skipped_images"]) else []),
            *(f"changed {n} images or labels: {rule}" for rule, n in summary["changed"].items()),
            "\nTo use it:",
            *(f"    {line}" for line in code),
            f"\nresults: {run.path}",
        ]
    )


def check_equal(difference: float, largest: float, run: RunFolder) -> float:
    """Return the largest logit difference of the reloaded model; raise RuntimeError if it exceeds rounding."""
    if difference > 1e-4 * largest:
        raise RuntimeError(f"{run.adapter} does not reproduce the trained model: a logit differs by {difference}")
    return difference
