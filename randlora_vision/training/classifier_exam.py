"""What is measured of a classifier: accuracy, overall and by class, on the task and on the base model's own.

Shapes: B images, C classes of the data, K outputs of the model, P pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from randlora_vision.training.images import Batch, ImageSplits, SkipList, Transform, evaluation_batches, sample_pictures
from randlora_vision.training.plots import Prediction
from randlora_vision.training.results import accuracies

_PICTURES = 32


@dataclass(frozen=True)
class Scores:
    """What a model makes of some images."""

    confusion: Tensor  # (C, K) int64: how many images of each class (row) got which answer
    top5: float
    loss: float | None  # None where the model does not know every class of the data

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name: top1, top5, and loss where there is one."""
        top1 = self.confusion.diagonal().sum().item() / self.confusion.sum().item()
        return {"top1": top1, "top5": self.top5, **({} if self.loss is None else {"loss": self.loss})}

    @property
    def per_class(self) -> list[float | None]:
        """The accuracy of each class; None for a class without images."""
        right = F.pad(self.confusion.diagonal(), (0, len(self.confusion) - min(self.confusion.shape)))
        return [
            hits / count if count else None
            for hits, count in zip(right.tolist(), self.confusion.sum(dim=1).tolist(), strict=True)
        ]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], classes: int) -> Scores:
    """Measure a model on data of `classes` classes; leaves it in eval mode.

    Answers beyond the data's classes count as wrong ones. With fewer than five outputs, top-5 counts them all.
    """
    model.eval()
    device = next(model.parameters()).device
    confusion, hits, loss, known = torch.zeros(0), 0, 0.0, False
    for batch in batches:
        labels = batch["labels"].to(device)
        logits = model(batch["images"].to(device)).float()
        outputs = logits.shape[1]
        if not len(confusion):
            confusion, known = torch.zeros(classes * outputs, dtype=torch.int64), outputs >= classes
        ranking = logits.topk(min(5, outputs)).indices
        hits += int((ranking == labels[:, None]).sum())
        confusion += torch.bincount(labels * outputs + ranking[:, 0], minlength=len(confusion)).cpu()
        loss += F.cross_entropy(logits, labels, reduction="sum").item() if known else 0.0
    total = int(confusion.sum())
    return Scores(confusion.view(classes, -1), hits / total, loss / total if known else None)


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
        return accuracies(self.tasks, self.results)


class Exam:
    """The test split, a sample of its pictures, and where there is one the test split of the original task."""

    def __init__(
        self,
        splits: ImageSplits,
        original: ImageSplits | None,
        transform: Transform,
        skipped: SkipList,
        batch_size: int,
        workers: int,
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
