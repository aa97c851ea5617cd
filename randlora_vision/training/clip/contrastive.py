"""The losses of images with captions, CLIP's and SigLIP's, over the pairs of all processes.

They are open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)` and `SigLipLoss`, which know nothing of
captions: two images of one caption are negatives of each other there. Here they are positives, and where
no caption repeats the numbers are open_clip's (and its gradients: its classes are not used because a class that
knows captions shares only the two matrix products with them, and because they gather by functions that PyTorch
has deprecated).

Shapes: b pairs of this process, B pairs of all processes, D shared dimension.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from randlora_vision.training.data.captioned import PairBatch
from randlora_vision.training.harness.distributed import gather_rows, row_counts

Contrast = Literal["clip", "siglip"]


def softmax_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sum (a scalar) over rows of the cross entropy of logits (b, B) with all of a row's positives.

    `positive` (b, B) bool. Of several positives each is wanted with equal probability.
    """
    targets = positive.to(logits.dtype)
    return F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True), reduction="sum")


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sum (a scalar) of -log sigmoid(z) over logits (b, B), z = logit where `positive`, -logit elsewhere."""
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()


def fitted_bias(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the bias (a scalar) at which the sigmoid loss of logits (B, B) is least.

    There the probabilities add up to the number of positives, which halving an interval finds. It stands in for
    the trained bias of SigLIP models where a model has none: without any, all pairs of a CLIP begin as
    likely ones. As it is the minimum, the gradient at the logits needs no term for it.
    """
    wanted = min(float(positive.sum()), positive.numel() - 0.5)
    prior = math.log(wanted / (positive.numel() - wanted))
    low, high = prior - logits.max(), prior - logits.min()
    for _ in range(40):
        middle = (low + high) / 2
        above = (logits + middle).sigmoid().sum() > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


@dataclass(frozen=True)
class Replay:
    """A batch of which the gradient is known that the joint loss of several batches has at its features."""

    batch: PairBatch
    image_gradient: Tensor  # (b, D)
    text_gradient: Tensor  # (b, D)
    other_gradients: Sequence[Tensor]  # at the logit scale and bias, as far as they are trained
    loss: Tensor  # the joint loss, a scalar
    batches: int  # over how many it is joint


class ContrastiveLoss(nn.Module):
    """The mean loss over the pairs of all processes, each against all texts and (CLIP's) all images.

    A process returns its share: the mean of the processes' values is the loss, and so the mean of
    their gradients, which DistributedDataParallel takes, is its gradient.
    """

    def __init__(self, model: nn.Module, contrast: Contrast) -> None:
        super().__init__()
        self.clip: Any = model  # open_clip's, whose two towers' methods no type of PyTorch's knows
        self.contrast = contrast

    def forward(self, batch: PairBatch | Replay) -> Tensor:
        """Return the loss of a batch, a scalar; or what has the gradient of a joint loss, and its value."""
        if isinstance(batch, Replay):
            return self._replay(batch)
        return self.pair_loss(*self.features(batch), batch["captions"])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the towers, and not the loss: what goes between processes is not for the compiler."""
        self.features = torch.compile(self.features, *args, **kwargs)  # type: ignore[method-assign]

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the image and text features (b, D), of unit length, in float32 or better."""
        images = self.clip.encode_image(batch["images"], normalize=True)
        texts = self.clip.encode_text(batch["tokens"], normalize=True)
        return _at_least_float32(images), _at_least_float32(texts)

    def pair_loss(self, images: Tensor, texts: Tensor, captions: Tensor) -> Tensor:
        """Return this process's share, a scalar, given its features (b, D) and the captions' numbers (b,)."""
        counts = row_counts(len(captions), captions.device)
        positive = captions[:, None] == gather_rows(captions, counts)
        with torch.autocast(images.device.type, enabled=False):  # rounded logits of scale 100 are off by 0.5
            scale = self.clip.logit_scale.exp()
            logits = scale * images @ gather_rows(texts, counts).T
            if self.contrast == "siglip":
                bias = getattr(self.clip, "logit_bias", None)
                if bias is None:
                    bias = fitted_bias(*(gather_rows(rows, counts) for rows in (logits.detach(), positive)))
                total = sigmoid_loss(logits + bias, positive)
            else:
                to_images = scale * texts @ gather_rows(images, counts).T
                total = (softmax_loss(logits, positive) + softmax_loss(to_images, positive)) / 2
        return total * (len(counts) / sum(counts))

    def join(self, batches: Sequence[PairBatch], seed: Callable[[int], None]) -> list[Replay]:
        """Return what to call this module with, batch by batch, for the loss of all `batches` as one.

        The mean of the losses and of the gradients are then those of the big batch, while no more than
        one batch's activations are kept: all features are computed first without them, then the loss and its
        gradient at the features, and each batch is computed again to pass its part of that on. `seed(k)`
        must put the random states at the k-th batch where they are when it is computed again.
        """
        features = []
        with torch.no_grad():
            for number, batch in enumerate(batches):
                seed(number)
                features.append(self.features(batch))
        sizes = [len(images) for images, _ in features]
        images, texts = (torch.cat(column).requires_grad_() for column in zip(*features, strict=True))
        with torch.enable_grad():
            loss = self.pair_loss(images, texts, torch.cat([batch["captions"] for batch in batches]))
        at_images, at_texts, *others = torch.autograd.grad(loss, [images, texts, *self.trained_scalars()])
        parts = zip(batches, at_images.split(sizes), at_texts.split(sizes), strict=True)
        return [Replay(*part, others, loss.detach(), len(batches)) for part in parts]

    def trained_scalars(self) -> list[nn.Parameter]:
        """Return the logit scale, and with SigLIP's loss the bias, as far as they are trained."""
        bias = getattr(self.clip, "logit_bias", None) if self.contrast == "siglip" else None
        return [scalar for scalar in (self.clip.logit_scale, bias) if scalar is not None and scalar.requires_grad]

    def _replay(self, replay: Replay) -> Tensor:
        images, texts = self.features(replay.batch)
        inner = (images * replay.image_gradient).sum() + (texts * replay.text_gradient).sum()
        carrier = inner * replay.batches  # the loop takes the mean over the batches
        for parameter, gradient in zip(self.trained_scalars(), replay.other_gradients, strict=True):
            carrier = carrier + (parameter * gradient).sum()
        return carrier + (replay.loss - carrier).detach()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
