"""Training a timm classifier as a task of the training loop: its loss, and what is measured and saved."""

from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from randlora_vision.training.classifier_exam import evaluate
from randlora_vision.training.classifier_methods import head_parameters
from randlora_vision.training.classifier_options import AugmentOptions, ClassifierOptions
from randlora_vision.training.images import Batch, LabelledImages, evaluation_batches, training_batches
from randlora_vision.training.methods import Adaptation


class ClassifierLoss(nn.Module):
    """Cross entropy of a model's logits, with timm's Mixup and CutMix and label smoothing."""

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
            even = len(images) - len(images) % 2  # odd where an image could not be read
            images, targets = self.mixup(images[:even].clone(), targets[:even])
        loss: Tensor = self.criterion(self.model(images), targets)
        return loss


class ClassifierTask:
    """What the loop trains: the loss on `train`, measured on `val`, saved to one file."""

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
        training = options.training
        assert training.steps is not None
        self.loss = ClassifierLoss(model, classes, options.augment)
        self._head_lr = options.adapter.head_lr
        self.classes = classes
        self.adaptation = adaptation
        self.path = path
        self.batches: DataLoader[Batch] = training_batches(
            train,
            training.batch_size,
            training.steps * training.gradient_accumulation_steps * processes,
            training.seed,
            training.workers,
        )
        self._val = evaluation_batches(val, training.batch_size, training.workers)

    def own_lr(self) -> dict[nn.Parameter, float]:
        """Return the learning rates that are not the common one, by parameter."""
        if self._head_lr is None:
            return {}
        return {p: self._head_lr for _, p in head_parameters(self.loss.model) if p.requires_grad}

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracies on the validation split."""
        return evaluate(self.loss.model, self._val, self.classes).values

    def check_gradients(self) -> list[str]:
        """Leave it to the method."""
        return self.adaptation.check_gradients()

    def save(self) -> str:
        """Write what was trained, on the process that has a path."""
        if self.path is not None:
            self.adaptation.save(self.path)
        return str(self.path)
