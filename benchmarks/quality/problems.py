"""What one run trains on: a pretrained model, a head, batches, a loss, and figures on validation and test samples.

Shapes: B samples in a batch, N samples, C classes, D features, P pixels a side.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EVALUATION_BATCH = 250
_RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Figures:
    """The figures of a trained model.

    Attributes:
        val: On the validation samples, which choose the rate.
        tests: On every set of test samples; "test" is the one of the table.
        constant: Whether the model gives one answer to all validation samples.
    """

    val: float
    tests: Mapping[str, float]
    constant: bool = False


@dataclass
class Problem:
    """The base of all problems: `inputs` (N, ...) with `answers` (N, ...), drawn in shuffled epochs."""

    base: nn.Module
    head: nn.Module
    inputs: Tensor
    answers: Tensor
    tests: Mapping[str, tuple[Tensor, Tensor]]
    """(inputs, answers) by name; "val" and "test" are among them."""
    batch: int
    seed: int
    order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = copy.deepcopy(self.head)
        self.generator = torch.Generator().manual_seed(self.seed)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and answers of the next B samples."""
        while len(self.order) < self.batch:
            self.order += torch.randperm(len(self.inputs), generator=self.generator).tolist()
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.inputs[chosen], self.answers[chosen]

    def some(self, number: int) -> Tensor:
        """Return the inputs of a number of samples, evenly spaced: few-shot samples are sorted by class."""
        return self.inputs[torch.arange(number) * len(self.inputs) // number]

    def features(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the features (B, ...) on which the rate is suggested, as in the scripts: those before a new head."""
        features: Tensor = model(inputs)
        return features

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the outputs (B, ...) that `criterion` and `score` compare with the answers."""
        outputs: Tensor = self.head(model(inputs))
        return outputs

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the next batch."""
        inputs, answers = self.next_batch()
        return self.criterion(self.outputs(model, inputs), answers)

    def criterion(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the loss for outputs of the head."""
        raise NotImplementedError

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Return the figure of the table for outputs of the head."""
        raise NotImplementedError

    @torch.no_grad()
    def figures(self, model: nn.Module) -> Figures:
        """Return the figures of a model."""
        model.eval()
        scores, constant = {}, False
        for name, (inputs, answers) in self.tests.items():
            outputs = torch.cat([self.outputs(model, part) for part in inputs.split(_EVALUATION_BATCH)])
            scores[name] = self.score(outputs, answers) if outputs.isfinite().all() else 0.0
            constant = constant or self.constant(outputs)
        return Figures(scores.pop("val"), scores, constant)

    def constant(self, outputs: Tensor) -> bool:
        """Return whether all outputs (N, ...) mean the same answer."""
        return False


class Classification(Problem):
    """Classes: cross-entropy and accuracy."""

    def criterion(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the cross-entropy of logits (B, C) with labels (B,)."""
        return F.cross_entropy(outputs, answers)

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Return the accuracy."""
        return float((outputs.argmax(-1) == answers).float().mean())

    def constant(self, outputs: Tensor) -> bool:
        """Return whether one class is predicted for everything."""
        return len(outputs.argmax(-1).unique()) == 1


@dataclass
class Aligned(Problem):
    """The base of problems whose head is pretrained and frozen: it maps features to those of texts."""

    temperature: float = 0.05

    def features(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the embeddings (B, D), which the head is a part of."""
        return F.normalize(self.head(model(inputs)), dim=-1)

    def logits(self, outputs: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines of outputs (B, D) and texts (C, D) over the temperature, (B, C)."""
        return F.normalize(outputs, dim=-1) @ texts.T / self.temperature


class Retrieval(Aligned):
    """Pictures and the features (N, D) of their captions, which stay as they are: contrastive loss and mean recall."""

    def criterion(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the symmetric contrastive loss of a batch."""
        logits = self.logits(outputs, answers)
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Return the mean of recall@1, 5 and 10 in both directions."""
        similar = self.logits(outputs, answers)
        own = similar.diagonal()
        recalls = []
        for rows in (similar, similar.T):
            rank = (rows > own[:, None]).sum(1)
            recalls += [float((rank < most).float().mean()) for most in _RECALL_AT]
        return sum(recalls) / len(recalls)


@dataclass
class Prompts(Aligned, Classification):
    """Classes by the features (C, D) of their prompts, `texts`, which stay as they are."""

    texts: Tensor = field(kw_only=True)

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits (B, C), the cosines to the texts."""
        return self.logits(super().outputs(model, inputs), self.texts)


class Regression(Problem):
    """A linear map to be learned: squared error, and the part of the answers' energy that is explained."""

    def criterion(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(outputs, answers)

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Return 1 - |error|^2 / |error of the base model|^2, at least 0; the head is scaled to make the latter 1."""
        return max(0.0, 1 - float(F.mse_loss(outputs, answers)))
