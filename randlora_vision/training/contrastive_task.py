"""Training a CLIP model on images with captions as a task of the loop."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.training.clip_models import LoadedClip
from randlora_vision.training.clip_options import ClipOptions
from randlora_vision.training.clip_task import own_rates
from randlora_vision.training.contrastive import ContrastiveLoss, Replay
from randlora_vision.training.methods import Adaptation
from randlora_vision.training.pairs import CaptionedImages, PairBatch, pair_batches
from randlora_vision.training.task import AdaptedTask, batches_consumed


class ContrastiveTask(AdaptedTask):
    """What the loop trains: the loss of the pairs in `train`, saved to one file; `evaluate` measures the model.

    With gradient accumulation a step's loss is that of all its pairs, as if they were one batch.
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
        """Return the learning rates that are not the common one, by parameter."""
        return own_rates(self.loss.clip, self._options)

    def join(self, batches: Sequence[PairBatch], seed: Callable[[int], None]) -> list[Replay]:
        """Make one loss of the batches of a step (see `JointTask`)."""
        return self.loss.join(batches, seed)

    def evaluate(self) -> dict[str, float]:
        """Return what is measured on the validation split."""
        return self._evaluate()
