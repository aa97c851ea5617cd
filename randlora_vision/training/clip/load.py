"""Loading a saved file of any method into a CLIP model, at full or partial strength."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision import load_adapter, set_scale
from randlora_vision.errors import printable_errors
from randlora_vision.files.metadata import FORMAT
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import PROBE, ClipClassifier, set_class_features
from randlora_vision.training.clip.options import ClipSettings
from randlora_vision.training.methods.adaptation import move, quiet
from randlora_vision.training.methods.lora import FORMAT as LORA_FORMAT
from randlora_vision.training.methods.lora import load_lora
from randlora_vision.training.methods.rivals import is_rival, load_rival


def load_classifier(
    clip: LoadedClip, class_names: Sequence[str] | None, settings: ClipSettings, path: Path, scale: float = 1.0
) -> ClipClassifier | None:
    """Call `load_trained`; return the classifier, of a probe at prompts + scale * (probe - prompts), if any."""
    probe = load_trained(clip.model, path, scale)
    if class_names is None:
        if probe is not None:
            raise ValueError(f"{path} is a linear classifier, but the data has captions, not classes")
        return None
    images = settings.images
    classifier = ClipClassifier(clip, class_names, images.templates, images.prompts, probe=probe is not None)
    own = classifier.class_features
    if probe is not None and own is not None:
        if own.shape != probe.shape:
            shapes = " x ".join(map(str, probe.shape)), " x ".join(map(str, own.shape))
            raise ValueError(
                f"{path} is a linear classifier of shape {shapes[0]}, but the model and the data need {shapes[1]}"
            )
        with torch.no_grad():
            own.copy_(torch.lerp(classifier.prompt_features(), probe.to(own), scale))
        own.requires_grad_(False)
    return classifier


@printable_errors
def load_trained(model: nn.Module, path: Path | str, scale: float = 1.0) -> Tensor | None:
    """Load a file that train_clip.py wrote, with any method, into a frozen base model, in place.

    Returns the class features (C, D) of a linear probe, or of one that was trained with an adapter, unscaled; None for
    other files. A probe alone does not change the model. At a `scale` s, the weights are base + s * (adapted - base): 1
    gives the trained weights, 0 the base weights. Raises ValueError for a file that is not an adapter file or belongs
    to another model.
    """
    path = Path(path)
    if path.is_dir():  # a PEFT adapter
        _load_randlora(model, path, scale)
        return None
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an adapter file: {error}") from None
    probe = tensors.get(PROBE, tensors.get(f"saved.{PROBE}"))  # the second is the name in our own format
    if set(tensors) == {PROBE}:
        return probe
    if probe is not None:
        set_class_features(model, torch.zeros_like(probe))  # which the loaders below replace
    kind = metadata.get("format")
    if kind == FORMAT:
        _load_randlora(model, path, scale)
    elif kind == LORA_FORMAT:
        load_lora(model, path, scale)
    elif is_rival(metadata):
        load_rival(model, path, scale)
    else:
        move(model, tensors, path, scale)
    return probe


def _load_randlora(model: nn.Module, path: Path, scale: float) -> None:
    with quiet():
        load_adapter(model, path)
    set_scale(model, scale)
