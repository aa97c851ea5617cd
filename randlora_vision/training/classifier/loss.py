"""The training loss of a classifier."""

from torch import Tensor, nn

from randlora_vision.training.classifier.options import AugmentOptions
from randlora_vision.training.data.labelled import Batch


class ClassifierLoss(nn.Module):
    """The losses of timm on the logits of a model, with Mixup, CutMix and label smoothing."""

    def __init__(self, model: nn.Module, classes: int, augment: AugmentOptions) -> None:
        super().__init__()
        from timm.data import Mixup
        from timm.loss import (
            BinaryCrossEntropy,
            JsdCrossEntropy,
            LabelSmoothingCrossEntropy,
            SoftTargetCrossEntropy,
        )

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
        if augment.jsd_loss:
            self.criterion = JsdCrossEntropy(augment.aug_splits, smoothing=augment.label_smoothing)
        if augment.bce_loss:  # mixed targets are already smooth
            self.criterion = BinaryCrossEntropy(
                0.0 if self.mixup else augment.label_smoothing, augment.bce_target_thresh
            )

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        images, targets = batch["images"], batch["labels"]
        if images.ndim == 5:  # copies of every image, which timm's loss expects one after the other
            targets = targets.repeat(images.shape[1])
            images = images.transpose(0, 1).flatten(0, 1)
        if self.mixup is not None:
            even = len(images) - len(images) % 2  # odd if an image could not be read
            images, targets = self.mixup(images[:even].clone(), targets[:even])
        loss: Tensor = self.criterion(self.model(images), targets)
        return loss
