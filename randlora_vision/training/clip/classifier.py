"""A CLIP model as an image classifier: class prompts, the loss and the accuracy.

Shapes: B images, C classes, T templates, L tokens, D shared dimension.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.contrastive import clamp_logit_scale
from randlora_vision.training.data.labelled import Batch
from randlora_vision.training.evaluation.accuracy import Scores, measure

PROBE = "class_features"  # name of a linear probe's parameter, in the module and in the file
_PROMPTS_AT_ONCE = 256


class ClipClassifier(nn.Module):
    """logits (B, C) = exp(logit_scale) * image features (B, D) @ class features (C, D)^T.

    The class features are the text features of the class prompts, averaged over the templates. With `probe`,
    they initialise a trained parameter, `class_features`, unless the model already holds one, which is trained with
    its adapters (`set_class_features`). Otherwise they are recomputed at every call if the text tower is trained, and
    computed once if it is frozen when the classifier is built.
    """

    def __init__(
        self,
        clip: LoadedClip,
        class_names: Sequence[str],
        templates: Sequence[str],
        prompts: Literal["average", "sample"] = "average",
        probe: bool = False,
    ) -> None:
        super().__init__()
        # Any: nn.Module does not declare encode_image and encode_text of open_clip.
        self.clip: Any = clip.model
        self.prompts = prompts
        texts = [template.replace("{}", name) for name in class_names for template in templates]
        device = next(clip.model.parameters()).device
        tokens = clip.tokenize(texts).unflatten(0, (len(class_names), len(templates)))
        self.register_buffer("tokens", tokens.to(device), persistent=False)  # (C, T, L)
        self.tokens: Tensor
        self.class_features: nn.Parameter | None = None
        self._frozen: Tensor | None = None  # (C, T, D)
        self.eval()  # cached features are computed as in evaluation: without dropout, for all templates
        if not text_tower_learns(clip.model):
            with torch.no_grad():
                self._frozen = self._encode(self.tokens)
        if probe:
            held = getattr(clip.model, PROBE, None)
            self.class_features = nn.Parameter(self.prompt_features().detach().clone()) if held is None else held

    def prompt_features(self) -> Tensor:
        """Return the class features (C, D), of unit length, of the prompts with the current text tower."""
        tokens, features = self.tokens, self._frozen
        if self.training and self.prompts == "sample":
            chosen = torch.randint(tokens.shape[1], (tokens.shape[0],)).to(tokens.device)
            classes = torch.arange(tokens.shape[0], device=tokens.device)
            tokens = tokens[classes, chosen, None]
            features = None if features is None else features[classes, chosen, None]
        if features is None:
            features = self._encode(tokens)
        return F.normalize(features.mean(dim=1), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of the images (B, 3, H, W)."""
        return self.logits(images, self._current_features())

    def logits(self, images: Tensor, class_features: Tensor) -> Tensor:
        """Return the logits (B, C) of the images (B, 3, H, W) for the given class features (C, D)."""
        image_features = self.clip.encode_image(images, normalize=True)
        return self.clip.logit_scale.exp() * image_features @ class_features.T

    @torch.no_grad()
    def scores(self, batches: Iterable[Batch]) -> Scores:
        """Evaluate the classifier on the batches. Leaves the model in eval mode."""
        self.eval()
        features = self._current_features()
        return measure(lambda images: self.logits(images, features), batches, len(self.tokens), features.device)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) in eval mode, in float32 on the CPU."""
        self.eval()
        return self(images.to(self.tokens.device)).float().cpu()

    def _current_features(self) -> Tensor:
        return self.prompt_features() if self.class_features is None else self.class_features

    def _encode(self, tokens: Tensor) -> Tensor:
        """Return the unit-length text features (C, T, D) of tokens (C, T, L)."""
        parts = tokens.flatten(0, 1).split(_PROMPTS_AT_ONCE)
        features = torch.cat([self.clip.encode_text(part, normalize=True) for part in parts])
        return features.unflatten(0, tokens.shape[:2])


class ClassPromptLoss(nn.Module):
    """The training loss: cross entropy of the logits of a classifier."""

    def __init__(self, classifier: ClipClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return F.cross_entropy(self.classifier(batch["images"]), batch["labels"])

    def clamp(self) -> None:
        """Keep a trained logit scale in its bounds."""
        clamp_logit_scale(self.classifier.clip)


def set_class_features(model: nn.Module, features: Tensor) -> None:
    """Give a CLIP model class features (C, D) as a parameter: every method trains and saves it as it does a weight."""
    device = next(model.parameters()).device
    model.register_parameter(PROBE, nn.Parameter(features.detach().clone().to(device), requires_grad=False))


def text_tower_learns(model: nn.Module) -> bool:
    """Return whether any parameter of the text tower requires a gradient."""
    return any(p.requires_grad for name, p in model.named_parameters() if belongs_to(name, "text"))


def belongs_to(name: str, tower: str) -> bool:
    """Return whether the open_clip parameter `name` belongs to `tower` ("vision" or "text").

    The logit scale and bias, class features, and CoCa's caption decoder, belong to neither.
    """
    if name.startswith("visual."):
        return tower == "vision"
    return tower == "text" and not name.startswith(("logit_", PROBE, "text_decoder."))
