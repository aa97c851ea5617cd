"""Tasks for the training loop that train a CLIP model on class prompts or on images with captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import ClassPromptLoss, ClipClassifier
from randlora_vision.training.clip.contrastive import ContrastiveLoss, Replay
from randlora_vision.training.clip.methods import (
    own_rates,
)
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.data.captioned import CaptionedImages, PairBatch, pair_batches
from randlora_vision.training.data.labelled import Batch, LabelledImages, evaluation_batches, training_batches
from randlora_vision.training.harness.task import AdaptedTask, batches_consumed
from randlora_vision.training.methods.adaptation import Adaptation


class ClassPromptTask(AdaptedTask):
    """Train with the classification loss on `train`, evaluate on `val`, and save to one file."""

    def __init__(
        self,
        classifier: ClipClassifier,
        adaptation: Adaptation,
        train: LabelledImages,
        val: LabelledImages,
        options: ClipOptions,
        processes: int,
        path: Path | None,
    ) -> None:
        super().__init__(adaptation, path)
        training = options.training
        self.loss = ClassPromptLoss(classifier)
        self.classifier = classifier
        self._options = options
        self.batches: DataLoader[Batch] = training_batches(
            train,
            training.batch_size,
            batches_consumed(training, processes),
            training.seed,
            training.workers,
        )
        self._val = evaluation_batches(val, training.batch_size, training.workers)

    def own_lr(self) -> dict[nn.Parameter, float]:
        """Return the learning rates that differ from the default, by parameter."""
        return own_rates(self.classifier.clip, self._options)

    def evaluate(self) -> dict[str, float]:
        """Return the loss and the accuracies on the validation split."""
        return self.classifier.scores(self._val).values


class ContrastiveTask(AdaptedTask):
    """Train with the contrastive loss on `train`, evaluate with `evaluate`, and save to one file.

    With gradient accumulation, the loss of a step covers all its pairs, as if they were one batch.
    """

    def __init__(
        self,
        clip: LoadedClip,
        adaptation: Adaptation,
        train: CaptionedImages,
        evaluate: Callable[[], dict[str, float]],
        options: ClipOptions,
        processes: int,
        path: Path | None,
    ) -> None:
        super().__init__(adaptation, path)
        training, loss = options.training, options.loss.loss
        assert loss == "clip" or loss == "siglip", "resolve the options first"
        self.loss = ContrastiveLoss(clip.model, loss)
        self._options = options
        self._evaluate = evaluate
        self.batches: DataLoader[PairBatch] = pair_batches(
            train,
            training.batch_size,
            batches_consumed(training, processes),
            training.seed,
            training.workers,
        )

    def own_lr(self) -> dict[nn.Parameter, float]:
        """Return the learning rates that differ from the default, by parameter."""
        return own_rates(self.loss.clip, self._options)

    def join(self, batches: Sequence[PairBatch], seed: Callable[[int], None]) -> list[Replay]:
        """Join the batches of a step into one loss (see `JointTask`)."""
        return self.loss.join(batches, seed)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics on the validation split."""
        return self._evaluate()
