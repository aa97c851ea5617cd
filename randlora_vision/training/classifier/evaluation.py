"""Evaluation of a classifier: overall and per-class accuracy, on the task and on the original task."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.training.classifier.options import ClassifierSettings
from randlora_vision.training.data.batches import evaluation_batches
from randlora_vision.training.data.labelled import Batch, ImageSplits, sample_pictures
from randlora_vision.training.data.pictures import Transform
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.evaluation.accuracy import Scores, measure
from randlora_vision.training.evaluation.collapse import collapse_warning
from randlora_vision.training.evaluation.curves import plot_curves
from randlora_vision.training.evaluation.grids import Prediction, list_predictions
from randlora_vision.training.evaluation.results import (
    Measured,
    confidence,
    log_results,
    plot_results,
    summarise,
    task_name,
)
from randlora_vision.training.harness.options import TrainingOptions
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.task import Speed
from randlora_vision.training.methods.adaptation import Adaptation

_PICTURES = 96  # sampled; those drawn are chosen among them


def evaluate(model: nn.Module, batches: Iterable[Batch], classes: int) -> Scores:
    """Evaluate a model on data with `classes` classes. Leaves it in eval mode."""
    model.eval()
    return measure(model, batches, classes, next(model.parameters()).device)


class Evaluation:
    """The test (or else validation) split with a sample of its pictures, and that of the original task, if any.

    `task` is the name of the results on the former: "test" or "validation".
    """

    def __init__(
        self,
        splits: ImageSplits,
        original: ImageSplits | None,
        transform: Transform,
        training: TrainingOptions,
        skipped: SkipList,
    ) -> None:
        self.skipped = skipped
        self.class_names = splits.class_names
        self.task = task_name(splits.final)
        tests = {self.task: splits, **({"original": original} if original else {})}
        self.tasks = {name: test.name for name, test in tests.items()}
        self.splits = {name: task_name(test.final) for name, test in tests.items()}
        data = {name: test.select(test.final, transform, skipped) for name, test in tests.items()}
        self._tests = {
            name: (evaluation_batches(data[name], training.batch_size, training.workers), len(test.class_names))
            for name, test in tests.items()
        }
        self.pictures, self.truths = sample_pictures(data[self.task], _PICTURES)
        self.images = torch.stack([transform(picture) for picture in self.pictures])

    def run(self, model: nn.Module) -> Measured:
        """Evaluate a model."""
        scores = {name: evaluate(model, batches, classes) for name, (batches, classes) in self._tests.items()}
        return Measured(self.tasks, self.splits, scores, self.predict(model))

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        """Return the logits (P, K) of the sample of pictures, in eval mode, in float32 on the CPU."""
        model.eval()
        logits: Tensor = model(self.images.to(next(model.parameters()).device))
        return logits.float().cpu()

    def predictions(self, before: Measured | None, after: Measured) -> Sequence[Prediction]:
        """Return the sample of pictures with both predictions."""
        earlier = before.logits if before else None
        return list_predictions(self.pictures, self.truths, self.class_names, earlier, after.logits)


def write_results(
    run: RunFolder,
    settings: ClassifierSettings,
    adaptation: Adaptation,
    head_numbers: int,
    evaluation: Evaluation,
    before: Measured | None,
    after: Measured,
    speed: Speed,
    reload_difference: float,
) -> dict[str, Any]:
    """Write the remaining files of the run folder; return the content of summary.json."""
    earlier = before.results if before else None
    log_results(run, earlier, after.results, speed.steps)
    method, title = settings.adapter.method, settings.model.title
    metrics, augment = run.read_metrics(), settings.augment
    plot_curves(metrics, f"{method} on {title}", run.curves)
    scores, names = after.scores[evaluation.task], evaluation.class_names
    when = "after training" if before is None else "before and after training"
    plot_results(run, evaluation.predictions(before, after), scores, names, evaluation.task, when)
    plain = not (augment.bce_loss or augment.mixup or augment.cutmix)
    summary = {
        **summarise(run, method, title, adaptation, speed, reload_difference, evaluation.skipped),
        "warning": collapse_warning(scores, names, evaluation.task, metrics, settings.training, plain),
        "head_numbers": head_numbers,
        "tasks": evaluation.tasks,
        "splits": evaluation.splits,
        "before": earlier,
        "after": after.results,
        **confidence({"before": earlier, "after": after.results}),
        "per_class": dict(zip(names, scores.per_class, strict=True)),
        "per_class_samples": dict(zip(names, scores.counts, strict=True)),
        "per_class_confidence": dict(zip(names, scores.class_intervals(), strict=True)),
    }
    run.write(run.summary, summary)
    return summary
