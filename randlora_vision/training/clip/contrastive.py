"""The CLIP and SigLIP losses for images with captions, over the pairs of all processes.

They correspond to `ClipLoss(local_loss=True, gather_with_grad=True)` and `SigLipLoss` of open_clip, which do not
compare captions: there, two images with the same caption are negatives of each other, and so are two captions of one
image. Here they are positives. If no caption and no image repeats, values and gradients equal those of open_clip. Its
classes are not used, because only the two matrix products could be shared, and because they gather with functions that
PyTorch has deprecated.

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

    `positive` is (b, B) bool. If a row has several positives, the target is uniform over them.
    """
    targets = positive.to(logits.dtype)
    return F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True), reduction="sum")


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sum (a scalar) of -log sigmoid(z) over logits (b, B), z = logit where `positive`, -logit elsewhere."""
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()


def fitted_bias(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the bias (a scalar) that minimises the sigmoid loss of logits (B, B).

    At the minimum, the probabilities sum to the number of positives; bisection finds it. It replaces the trained
    bias of SigLIP for models without one: without any bias, a CLIP model starts with high probabilities for all
    pairs. Because the bias is at the minimum, the gradient with respect to the logits needs no term for it.
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
    """A batch and the gradient of the joint loss of several batches with respect to its features."""

    batch: PairBatch
    image_gradient: Tensor  # (b, D)
    text_gradient: Tensor  # (b, D)
    other_gradients: Sequence[Tensor]  # with respect to the trained ones of logit scale and bias
    loss: Tensor  # the joint loss, a scalar
    batches: int  # number of batches in the joint loss


@torch.no_grad()
def clamp_logit_scale(model: Any) -> None:
    """Move a trained logit scale into [0, ln 100], as the training of open_clip does after every step."""
    if model.logit_scale.requires_grad:
        model.logit_scale.clamp_(0, math.log(100))


class ContrastiveLoss(nn.Module):
    """The mean contrastive loss over the pairs of all processes.

    Each image is compared with all texts and, for the CLIP loss, each text with all images. Each process returns its
    share: the mean of the shares over the processes is the loss. DistributedDataParallel averages the gradients over
    the processes, so the result is the gradient of the loss.
    """

    def __init__(self, model: nn.Module, contrast: Contrast) -> None:
        super().__init__()
        self.clip: Any = model  # nn.Module does not declare encode_image and encode_text
        self.contrast = contrast

    def forward(self, batch: PairBatch | Replay) -> Tensor:
        """Return the loss of a batch, a scalar; for a `Replay`, one with value and gradient of the joint loss."""
        if isinstance(batch, Replay):
            return self._replay(batch)
        return self.pair_loss(*self.features(batch), batch["captions"], batch["indices"])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the towers but not the loss, which communicates between processes."""
        self.features = torch.compile(self.features, *args, **kwargs)  # type: ignore[method-assign]

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the image and text features (b, D), of unit length, in float32 or higher precision."""
        images = self.clip.encode_image(batch["images"], normalize=True)
        texts = self.clip.encode_text(batch["tokens"], normalize=True)
        return _at_least_float32(images), _at_least_float32(texts)

    def pair_loss(self, images: Tensor, texts: Tensor, captions: Tensor, owners: Tensor, alone: bool = False) -> Tensor:
        """Return this process's share of the loss for features (b, D); `alone`: of its own pairs.

        Pairs with equal `captions` (b,) or `owners` (b,), the numbers of the images, are positives. A negative number
        stands for no image.
        """
        counts = [len(captions)] if alone else row_counts(len(captions), captions.device)
        ids = torch.stack((captions, owners), dim=1)
        same_caption, same_image = (ids[:, None] == gather_rows(ids, counts)).unbind(-1)
        positive = same_caption | (same_image & (owners >= 0)[:, None])
        with torch.autocast(images.device.type, enabled=False):  # at a logit scale of 100, rounding errs by up to 0.5
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

    @torch.no_grad()
    def mean_loss(self, images: Tensor, texts: Tensor, captions: Tensor, owners: Tensor, pairs: int) -> float:
        """Return the mean loss of N pairs on the CPU, `pairs` at a time in a fixed random order.

        Features are (N, D), caption and image ids (N,). The loss depends on how many pairs are compared at a time.
        """
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
        total = 0.0
        for rows in order.split(pairs):
            device = self.clip.logit_scale.device
            image, text, caption, owner = (column[rows].to(device) for column in (images, texts, captions, owners))
            total += self.pair_loss(image, text, caption, owner, alone=True).item() * len(rows)
        return total / len(captions)

    def join(self, batches: Sequence[PairBatch], seed: Callable[[int], None]) -> list[Replay]:
        """Return the inputs to this module, one per batch, for the loss of all `batches` as a single batch.

        The means of the losses and of the gradients then equal those of the single large batch, but the activations
        of only one batch are kept in memory at a time: first all features are computed without gradients, then the
        loss and its gradient with respect to the features; finally, each batch is computed again to backpropagate
        its part of that gradient. `seed(k)` must set the random state that batch k has when it is computed again.
        """
        features = []
        with torch.no_grad():
            for number, batch in enumerate(batches):
                seed(number)
                features.append(self.features(batch))
        sizes = [len(images) for images, _ in features]
        images, texts = (torch.cat(column).requires_grad_() for column in zip(*features, strict=True))
        with torch.enable_grad():
            captions, owners = (torch.cat([batch[name] for batch in batches]) for name in ("captions", "indices"))
            loss = self.pair_loss(images, texts, captions, owners)
        at_images, at_texts, *others = torch.autograd.grad(loss, [images, texts, *self.trained_scalars()])
        parts = zip(batches, at_images.split(sizes), at_texts.split(sizes), strict=True)
        return [Replay(*part, others, loss.detach(), len(batches)) for part in parts]

    def clamp(self) -> None:
        """Keep a trained logit scale in its bounds."""
        clamp_logit_scale(self.clip)

    def trained_scalars(self) -> list[nn.Parameter]:
        """Return the logit scale and, for the SigLIP loss, the logit bias, if they are trained."""
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
