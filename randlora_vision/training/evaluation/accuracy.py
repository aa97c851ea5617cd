"""Accuracy of a classifier: top-1, top-5 and per class.

By hand, because given the rows that all processes share, each metric is one line of PyTorch.

Shapes: B images, C classes of the data, K outputs of the model.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from randlora_vision.training.data.labelled import NOT_MEASURED, Batch
from randlora_vision.training.evaluation.intervals import wilson
from randlora_vision.training.harness.distributed import measure_all

_TOP = 5


@dataclass(frozen=True)
class Scores:
    """The results of a model on some images."""

    confusion: Tensor  # (C, K) int64: how many images of each class (row) got which answer
    top5: float | None  # None where the model has five outputs or fewer: it would be 100%
    loss: float | None  # None where the model does not know every class of the data

    @property
    def values(self) -> dict[str, float]:
        """The metrics by name: top1, top5 and loss if there are such, and the number of samples that were measured."""
        samples = int(self.confusion.sum())
        top1 = self.confusion.diagonal().sum().item() / samples
        others = {"top5": self.top5, "loss": self.loss}
        return {"top1": top1, **{name: v for name, v in others.items() if v is not None}, "samples": samples}

    @property
    def per_class(self) -> list[float | None]:
        """The accuracy of each class; None for a class without images."""
        right = F.pad(self.confusion.diagonal(), (0, len(self.confusion) - min(self.confusion.shape)))
        return [hits / count if count else None for hits, count in zip(right.tolist(), self.counts, strict=True)]

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        return self.confusion.sum(dim=1).tolist()

    def class_intervals(self) -> list[tuple[float, float] | None]:
        """Return the 95% interval of the accuracy of each class; None for a class without images."""
        return [
            None if value is None else wilson(value, count)
            for value, count in zip(self.per_class, self.counts, strict=True)
        ]


@torch.no_grad()
def measure(
    logits_of: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: int, device: torch.device
) -> Scores:
    """Evaluate `logits_of`, images (B, 3, H, W) to logits (B, K), on data with `classes` classes.

    Answers outside the data's classes count as wrong.
    Several processes share the batches and all get the same results.
    """
    outputs = 0

    def answer(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nonlocal outputs
        labels = batch["labels"].to(device)
        logits = logits_of(batch["images"].to(device)).float()
        outputs = logits.shape[1]
        ranking = logits.topk(min(_TOP, outputs)).indices
        losses = (
            F.cross_entropy(logits, labels, reduction="none", ignore_index=NOT_MEASURED)
            if outputs >= classes
            else torch.zeros_like(labels)
        )
        return labels, ranking[:, 0], (ranking == labels[:, None]).sum(dim=1), losses

    columns = measure_all(batches, answer)
    labels, answers, hits, losses = (column[columns[0] != NOT_MEASURED] for column in columns)
    confusion = torch.bincount(labels * outputs + answers, minlength=classes * outputs).view(classes, outputs)
    loss = losses.double().mean().item() if outputs >= classes else None
    return Scores(confusion, int(hits.sum()) / len(labels) if outputs > _TOP else None, loss)
