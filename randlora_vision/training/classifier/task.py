"""The task that trains a timm classifier: its loss, evaluation and saving."""

from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from randlora_vision.training.classifier.evaluation import evaluate
from randlora_vision.training.classifier.methods import head_parameters
from randlora_vision.training.classifier.options import AugmentOptions, ClassifierOptions
from randlora_vision.training.data.labelled import Batch, LabelledImages, evaluation_batches, training_batches
from randlora_vision.training.harness.optim import layer_rates, timm_layers
from randlora_vision.training.harness.task import AdaptedTask, batches_consumed
from randlora_vision.training.methods.adaptation import Adaptation


class ClassifierLoss(nn.Module):
    """Cross entropy of the logits of a model, with Mixup, CutMix and label smoothing from timm."""

    def __init__(self, model: nn.Module, classes: int, augment: AugmentOptions) -> None:
        super().__init__()
        from timm.data import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        self.model = model
        self.mixup: Mixup | None = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(augment.label_smoothing)
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=classes
            )
            self.criterion = SoftTargetCrossEntropy()
        elif not augment.label_smoothing:
            self.criterion = nn.CrossEntropyLoss()

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        images, targets = batch["images"], batch["labels"]
        if self.mixup is not None:
            even = len(images) - len(images) % 2  # odd if an image could not be read
            images, targets = self.mixup(images[:even].clone(), targets[:even])
        loss: Tensor = self.criterion(self.model(images), targets)
        return loss


class ClassifierTask(AdaptedTask):
    """Train with the loss on `train`, evaluate on `val`, and save to one file."""

    def __init__(
        self,
        model: nn.Module,
        adaptation: Adaptation,
        train: LabelledImages,
        val: LabelledImages,
        classes: int,
        options: ClassifierOptions,
        processes: int,
        path: Path | None,
    ) -> None:
        super().__init__(adaptation, path)
        training = options.training
        self.loss = ClassifierLoss(model, classes, options.augment)
        self._options = options
        self.classes = classes
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
        model, lr, head_lr = self.loss.model, self._options.training.lr, self._options.adapter.head_lr
        assert lr is not None, "resolve the options first"
        decay = self._options.rates.layer_decay
        rates = layer_rates(model, [timm_layers(model)], lr, decay) if decay != 1 else {}
        if head_lr is not None:
            rates |= {p: head_lr for _, p in head_parameters(model) if p.requires_grad}
        return rates

    def evaluate(self) -> dict[str, float]:
        """Return the loss and the accuracies on the validation split."""
        return evaluate(self.loss.model, self._val, self.classes).values
