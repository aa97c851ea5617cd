"""The end of a CLIP run: pictures and summary in the run folder, and what is said on the terminal."""

from typing import Any

from randlora_vision.training.clip_exam import Answers, Exam
from randlora_vision.training.clip_options import ClipOptions, model_title
from randlora_vision.training.loop import Speed
from randlora_vision.training.methods import Adaptation
from randlora_vision.training.plots import plot_curves, plot_predictions
from randlora_vision.training.run_folder import RunFolder


def write_results(
    run: RunFolder,
    options: ClipOptions,
    adaptation: Adaptation,
    exam: Exam,
    before: Answers,
    after: Answers,
    speed: Speed,
    reload_difference: float,
) -> dict[str, Any]:
    """Write what is left of the run folder; return the content of summary.json."""
    for step, answers in ((0, before), (options.training.steps or 0, after)):
        for name, values in answers.results.items():
            run.log(step, name, values)
    title = f"{options.adapter.method} on {model_title(options)}"
    plot_curves(run.read_metrics(), title, run.curves)
    plot_predictions(
        exam.predictions(before, after), "Test images and the answers before and after training", run.predictions
    )
    trained = sum(parameter.numel() for _, parameter in adaptation.parameters())
    summary = {
        "method": options.adapter.method,
        "model": model_title(options),
        "trained_numbers": trained,
        "file_bytes": run.adapter.stat().st_size,
        "steps": options.training.steps,
        "seconds": round(speed.seconds, 2),
        "images_per_second": round(speed.images_per_second, 1),
        "before": before.results,
        "after": after.results,
        "reload_difference": reload_difference,
        "skipped_images": exam.skipped.count(),
    }
    run.write(run.summary, summary)
    return summary


def closing_words(
    run: RunFolder,
    options: ClipOptions,
    adaptation: Adaptation,
    before: Answers,
    after: Answers,
    summary: dict[str, Any],
) -> str:
    """Return the accuracies, the file, the proof of the reload, and the Python that loads the file."""
    return "\n".join(
        [
            f"\nbefore: {before}",
            f"after:  {after}",
            f"trained {summary['trained_numbers']:,} numbers for {summary['seconds']:.0f} s at "
            f"{summary['images_per_second']:.0f} images/s",
            f"saved {run.adapter} ({summary['file_bytes']:,} bytes); loaded into a fresh base model it gives equal "
            f"outputs (largest difference of a logit: {summary['reload_difference']:.1e})",
            *([f"skipped {n} unreadable images, listed in {run.skipped}"] if (n := summary["skipped_images"]) else []),
            "\nTo use it:",
            *(f"    {line}" for line in loading_code(run, options, adaptation)),
            f"\nresults: {run.path}",
        ]
    )


def loading_code(run: RunFolder, options: ClipOptions, adaptation: Adaptation) -> list[str]:
    """Return the Python that makes the adapted model again."""
    name, pretrained = options.clip.model or "", options.clip.pretrained
    lines = ["import open_clip"]
    if name.endswith(".json"):
        lines.append(f"open_clip.add_model_config({name!r})")
        name = model_title(options)
    weights = f", pretrained={pretrained!r}" if pretrained else ""
    lines.append(f"model, _, preprocess = open_clip.create_model_and_transforms({name!r}{weights})")
    return lines + adaptation.loading_code(run.adapter)
