"""Loading a saved file of any method into a CLIP model, at full or partial strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision import load_adapter, set_scale
from randlora_vision.errors import printable_errors
from randlora_vision.files.metadata import FORMAT
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import PROBE, ClipClassifier
from randlora_vision.training.clip.options import ClipOptions
from randlora_vision.training.methods.adaptation import quiet
from randlora_vision.training.methods.lora import FORMAT as LORA_FORMAT
from randlora_vision.training.methods.lora import LowRank, load_lora


def reload(
    clip: LoadedClip, class_names: Sequence[str] | None, options: ClipOptions, path: Path, scale: float = 1.0
) -> ClipClassifier | None:
    """Load a saved file into a base model, in place, and return its classifier if there are classes.

    See `put_on`. At a `scale` s, the features of a linear probe are prompts + s * (probe - prompts).
    """
    probe = put_on(clip.model, path, scale)
    if class_names is None:
        if probe is not None:
            raise ValueError(f"{path} is a linear classifier, but the data has captions, not classes")
        return None
    classifier = ClipClassifier(
        clip, class_names, options.images.templates, options.images.prompts, probe=probe is not None
    )
    own = classifier.class_features
    if probe is not None and own is not None:
        if own.shape != probe.shape:
            shapes = " x ".join(map(str, probe.shape)), " x ".join(map(str, own.shape))
            raise ValueError(
                f"{path} is a linear classifier of shape {shapes[0]}, but the model and the data need {shapes[1]}"
            )
        with torch.no_grad():
            own.copy_(torch.lerp(own, probe.to(own), scale))
        own.requires_grad_(False)
    return classifier


@printable_errors
def put_on(model: nn.Module, path: Path, scale: float = 1.0) -> Tensor | None:
    """Load a file into a frozen base model, in place; return the class features (C, D) of a linear probe.

    At a `scale` s, the weights are base + s * (adapted - base): 1 gives the trained weights, 0 the base weights. The
    features of a probe are returned unscaled, and the model is not changed. Raises ValueError for a file that is not
    an adapter file or belongs to another model.
    """
    if path.is_dir():  # a PEFT adapter
        _load_randlora(model, path, scale)
        return None
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an adapter file: {error}") from None
    kind = metadata.get("format")
    if kind == FORMAT:
        _load_randlora(model, path, scale)
    elif kind == LORA_FORMAT:
        load_lora(model, path)
        for part in model.modules():
            if isinstance(part, LowRank):
                part.scale *= scale
    elif set(tensors) == {PROBE}:
        return tensors[PROBE]
    else:
        _move(model, tensors, path, scale)
    return None


def _load_randlora(model: nn.Module, path: Path, scale: float) -> None:
    with quiet():
        load_adapter(model, path)
    set_scale(model, scale)


@torch.no_grad()
def _move(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, scale: float) -> None:
    """Interpolate the fully trained parameters from their values in the model towards those in the file."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path} is not an adapter of this model: {type(model).__name__} has no parameter {name}")
        if parameters[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file and {tuple(parameters[name].shape)} in the model"
            raise ValueError(f"{path} is not an adapter of this model: {name} is {shapes}")
    for name, tensor in tensors.items():
        own = parameters[name]
        own.copy_(torch.lerp(own, tensor.to(own), scale))
