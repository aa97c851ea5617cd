"""What train_clip.py minimises and evaluates during training: class prompts, or images with captions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import ClassPromptLoss, ClipClassifier
from randlora_vision.training.clip.contrastive import ContrastiveLoss
from randlora_vision.training.clip.options import ClipSettings
from randlora_vision.training.clip.retrieval import retrieval_features
from randlora_vision.training.data.batches import Pictures, evaluation_batches, spaced_batch
from randlora_vision.training.data.captioned import PairSplits, class_captions
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.splits import Splits
from randlora_vision.training.harness.distributed import process_and_processes
from randlora_vision.training.methods.adaptation import SAMPLES


def training_data(clip: LoadedClip, data: Splits, settings: ClipSettings, skipped: SkipList) -> Pictures:
    """Return the training images with their labels, or with captions if the loss needs them."""
    transform = clip.training_transform(data.augment)
    if not isinstance(data, PairSplits):
        if settings.loss.loss == "class-prompts":
            return data.select("train", transform, skipped)
        data = class_captions(data, settings.images.templates, clip.tokenize)
    return data.select("train", transform, clip.tokenize, skipped)


def tower_features(clip: LoadedClip, data: Splits, templates: Sequence[str]) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that gives the features (B, D) of a few validation images and of their captions or prompts."""
    pairs = data if isinstance(data, PairSplits) else class_captions(data, templates, clip.tokenize)
    batch = spaced_batch(pairs.select("val", clip.eval_transform, clip.tokenize, SkipList(), draw=False), SAMPLES)
    model: Any = clip.model  # nn.Module does not declare encode_image and encode_text of open_clip
    device = next(model.parameters()).device
    images, tokens = batch["images"].to(device), batch["tokens"].to(device)
    return lambda: (model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True))


def preprocessing_of(clip: LoadedClip, data: Splits, settings: ClipSettings) -> dict[str, dict[str, Any]]:
    """Return what a run folder keeps: how images are prepared, in open_clip's words."""
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import AugmentationCfg

    own = {"augmentation of the data": str(data.augment)} if data.augment else None
    return {
        "evaluation": {**get_model_preprocess_cfg(clip.model), "background": settings.images.background},
        "training": own or asdict(AugmentationCfg(**settings.clip.augmentation)),
    }


def loss_of(clip: LoadedClip, classifier: ClipClassifier | None, settings: ClipSettings) -> nn.Module:
    """Return the loss of a batch; the classifier is needed for class prompts."""
    if settings.loss.loss == "class-prompts":
        assert classifier is not None, "class prompts need classes: resolve checks this"
        return ClassPromptLoss(classifier)
    return ContrastiveLoss(clip.model, settings.loss.loss)


def validation(
    clip: LoadedClip, data: Splits, classifier: ClipClassifier | None, settings: ClipSettings, skipped: SkipList
) -> Callable[[], dict[str, float]]:
    """Return a function that evaluates the model on the validation split."""
    batch_size, workers = settings.training.batch_size, settings.training.workers
    if isinstance(data, PairSplits):
        pairs = data.select("val", clip.eval_transform, clip.tokenize, skipped, draw=False)
        loss = ContrastiveLoss(clip.model, "siglip" if settings.loss.loss == "siglip" else "clip")
        # As many pairs at a time as in training, where the loss grows with their number.
        at_once = batch_size * settings.training.gradient_accumulation_steps * process_and_processes()[1]

        def evaluate() -> dict[str, float]:
            found = retrieval_features(clip.model, pairs, batch_size, workers)
            return {"loss": loss.mean_loss(*found.pairs(), at_once), **found.values}

        return evaluate
    assert classifier is not None, "data with classes has a classifier"
    judge, batches = (
        classifier,
        evaluation_batches(data.select("val", clip.eval_transform, skipped), batch_size, workers),
    )
    return lambda: judge.scores(batches).values
