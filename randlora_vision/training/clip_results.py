"""The end of a CLIP run: pictures and summary in the run folder, and what is said on the terminal."""

from typing import Any

from randlora_vision.training.clip_exam import Answers, Exam
from randlora_vision.training.clip_options import ClipOptions, model_title
from randlora_vision.training.loop import Speed
from randlora_vision.training.methods import Adaptation
from randlora_vision.training.plots import plot_curves, plot_predictions
from randlora_vision.training.results import summarise
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
    for step, answers in ((0, before), (speed.steps, after)):
        for name, values in answers.results.items():
            run.log(step, name, values)
    title = f"{options.adapter.method} on {model_title(options)}"
    plot_curves(run.read_metrics(), title, run.curves)
    plot_predictions(
        exam.predictions(before, after), "Test images and the answers before and after training", run.predictions
    )
    method, title = options.adapter.method, model_title(options)
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, exam.skipped),
        "tasks": exam.tasks,
        "before": before.results,
        "after": after.results,
    }
    run.write(run.summary, summary)
    return summary


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
