"""Evaluation of a classifier: overall and per-class accuracy, on the task and on the original task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.training.classifier.options import ClassifierOptions, model_title
from randlora_vision.training.data.labelled import Batch, ImageSplits, evaluation_batches, sample_pictures
from randlora_vision.training.data.pictures import Transform
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.accuracy import Scores, measure
from randlora_vision.training.evaluation.plots import Prediction, plot_confusion, plot_curves, plot_predictions
from randlora_vision.training.evaluation.results import confidence, in_words, summarise, task_name
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed
from randlora_vision.training.methods.adaptation import Adaptation

_PICTURES = 32


def evaluate(model: nn.Module, batches: Iterable[Batch], classes: int) -> Scores:
    """Evaluate a model on data with `classes` classes. Leaves it in eval mode."""
    model.eval()
    return measure(model, batches, classes, next(model.parameters()).device)


@dataclass(frozen=True)
class Answers:
    """The results of a model on the tests."""

    tasks: Mapping[str, str]  # test -> name of its data
    scores: Mapping[str, Scores]
    logits: Tensor  # for the sample of pictures (P, K)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """The metrics of each test."""
        return {name: scores.values for name, scores in self.scores.items()}

    def __str__(self) -> str:
        return in_words(self.tasks, self.results)


class Exam:
    """The test (or else validation) split with a sample of its pictures, and that of the original task, if any.

    `task` is the name of the results on the former: "test" or "validation".
    """

    def __init__(
        self,
        splits: ImageSplits,
        original: ImageSplits | None,
        transform: Transform,
        skipped: SkipList,
        batch_size: int,
        workers: int | None,
    ) -> None:
        self.skipped = skipped
        self.class_names = splits.class_names
        self.task = task_name(splits.final)
        tests = {self.task: splits, **({"original": original} if original else {})}
        self.tasks = {name: test.name for name, test in tests.items()}
        data = {name: test.select(test.final, transform, skipped) for name, test in tests.items()}
        self._tests = {
            name: (evaluation_batches(data[name], batch_size, workers), len(test.class_names))
            for name, test in tests.items()
        }
        self.pictures, self.truths = sample_pictures(data[self.task], _PICTURES)
        self.images = torch.stack([transform(picture) for picture in self.pictures])

    def take(self, model: nn.Module) -> Answers:
        """Evaluate a model."""
        scores = {name: evaluate(model, batches, classes) for name, (batches, classes) in self._tests.items()}
        return Answers(self.tasks, scores, self.predict(model))

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        """Return the logits (P, K) of the sample of pictures, in eval mode, in float32 on the CPU."""
        model.eval()
        logits: Tensor = model(self.images.to(next(model.parameters()).device))
        return logits.float().cpu()

    def predictions(self, before: Answers | None, after: Answers) -> Sequence[Prediction]:
        """Return the sample of pictures with both predictions."""
        was = [None] * len(self.truths) if before is None else before.logits.argmax(dim=1).tolist()
        return [
            Prediction(
                picture,
                self.class_names[truth],
                None if old is None else self.class_names[old],
                self.class_names[new],
            )
            for picture, truth, old, new in zip(
                self.pictures, self.truths, was, after.logits.argmax(dim=1).tolist(), strict=True
            )
        ]


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
    """Write the remaining files of the run folder; return the content of summary.json."""
    for step, answers in ((0, before), (speed.steps, after)):
        for name, values in (answers.results if answers else {}).items():
            run.log(step, name, values)
    method, model = options.adapter.method, model_title(options)
    plot_curves(run.read_metrics(), f"{method} on {model}", run.curves)
    when = "after" if before is None else "before and after"
    title = f"{exam.task.capitalize()} images and predictions {when} training"
    plot_predictions(exam.predictions(before, after), title, run.predictions)
    scores, names = after.scores[exam.task], exam.class_names
    # The head has one output per class of the data, so the matrix is square.
    title = f"Predictions on the {exam.task} images, top-1 {scores.values['top1']:.1%}"
    plot_confusion(scores.confusion.tolist(), names, title, run.confusion)
    summary = {
        **summarise(run, method, model, adaptation, speed, reload_difference, exam.skipped),
        "head_numbers": head_numbers,
        "tasks": exam.tasks,
        "before": None if before is None else before.results,
        "after": after.results,
        **confidence({"before": before.results if before else None, "after": after.results}),
        "per_class": dict(zip(names, scores.per_class, strict=True)),
        "per_class_samples": dict(zip(names, scores.counts, strict=True)),
        "per_class_confidence": dict(zip(names, scores.class_intervals(), strict=True)),
    }
    run.write(run.summary, summary)
    return summary
