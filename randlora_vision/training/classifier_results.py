"""The end of a classifier's run: pictures and summary in the run folder."""

from typing import Any

from randlora_vision.training.classifier_exam import Answers, Exam
from randlora_vision.training.classifier_options import ClassifierOptions, model_title
from randlora_vision.training.methods import Adaptation
from randlora_vision.training.plots import plot_confusion, plot_curves, plot_predictions
from randlora_vision.training.results import summarise
from randlora_vision.training.run_folder import RunFolder
from randlora_vision.training.task import Speed


def write_results(
    run: RunFolder,
    options: ClassifierOptions,
    adaptation: Adaptation,
    head_numbers: int,
    exam: Exam,
    before: Answers | None,
    after: Answers,
    speed: Speed,
    reload_difference: float,
) -> dict[str, Any]:
    """Write what is left of the run folder; return the content of summary.json."""
    for step, answers in ((0, before), (speed.steps, after)):
        for name, values in (answers.results if answers else {}).items():
            run.log(step, name, values)
    method, title = options.adapter.method, model_title(options)
    plot_curves(run.read_metrics(), f"{method} on {title}", run.curves)
    when = "after" if before is None else "before and after"
    plot_predictions(exam.predictions(before, after), f"Test images and the answers {when} training", run.predictions)
    scores, names = after.scores["test"], exam.class_names
    top1 = scores.values["top1"]
    # The head has one output for each class of the data: the matrix is square.
    plot_confusion(scores.confusion.tolist(), names, f"Answers on the test images, top-1 {top1:.1%}", run.confusion)
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, exam.skipped),
        "head_numbers": head_numbers,
        "tasks": exam.tasks,
        "before": None if before is None else before.results,
        "after": after.results,
        "per_class": dict(zip(names, scores.per_class, strict=True)),
    }
    run.write(run.summary, summary)
    return summary
