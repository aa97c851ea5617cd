"""What is measured of a classifier: accuracy, overall and by class, on the task and on the base model's own.

Shapes: K outputs of the model, P pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora_vision.training.accuracy import Scores, measure
from randlora_vision.training.images import Batch, ImageSplits, SkipList, Transform, evaluation_batches, sample_pictures
from randlora_vision.training.plots import Prediction
from randlora_vision.training.results import in_words

_PICTURES = 32


def evaluate(model: nn.Module, batches: Iterable[Batch], classes: int) -> Scores:
    """Measure a model on data of `classes` classes; leaves it in eval mode."""
    model.eval()
    return measure(model, batches, classes, next(model.parameters()).device)


@dataclass(frozen=True)
class Answers:
    """What a model makes of the tests."""

    tasks: Mapping[str, str]  # what each test is of
    scores: Mapping[str, Scores]
    logits: Tensor  # of the sample of pictures (P, K)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """The numbers of each test."""
        return {name: scores.values for name, scores in self.scores.items()}

    def __str__(self) -> str:
        return in_words(self.tasks, self.results)


class Exam:
    """The test split, a sample of its pictures, and where there is one the test split of the original task."""

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
        tests = {"test": splits, **({"original": original} if original else {})}
        self.tasks = {name: test.name for name, test in tests.items()}
        data = {name: test.select("test", transform, skipped) for name, test in tests.items()}
        self._tests = {
            name: (evaluation_batches(data[name], batch_size, workers), len(test.class_names))
            for name, test in tests.items()
        }
        self.pictures, self.truths = sample_pictures(data["test"], _PICTURES)
        self.images = torch.stack([transform(picture) for picture in self.pictures])

    def take(self, model: nn.Module) -> Answers:
        """Measure a model."""
        scores = {name: evaluate(model, batches, classes) for name, (batches, classes) in self._tests.items()}
        return Answers(self.tasks, scores, self.predict(model))

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        """Return the logits (P, K) of the sample of pictures, in eval mode, in float32 on the CPU."""
        model.eval()
        logits: Tensor = model(self.images.to(next(model.parameters()).device))
        return logits.float().cpu()

    def predictions(self, before: Answers | None, after: Answers) -> Sequence[Prediction]:
        """Return the sample of pictures with both answers."""
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
