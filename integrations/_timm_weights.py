"""Files of weights for timm's classifiers, which timm adapts to the model where names or shapes differ."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from randlora_vision.errors import failures, without_logs
from randlora_vision.integrations.timm import head_modules
from randlora_vision.names import listing
from randlora_vision.skeletons import without_draws

_NPZ_HEADS = ("head/bias", "head/conv2d/bias")


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    `tensors` have the names and shapes of the model, except that the classifier has `classes` outputs, or is absent
    (None). They are None for an .npz, which timm reads into a model. `arguments` make timm.create_model load the file;
    they are empty if timm.models.load_checkpoint has to, because the file has no classifier.
    """

    path: str
    flag: str
    classes: int | None
    tensors: Mapping[str, Tensor] | None
    arguments: Mapping[str, Any]

    def load(self, model: nn.Module) -> None:
        """Load the weights in place; raise ValueError if they do not fit or some are absent."""
        with failures(f"{self.flag} {self.path} does not fit the model"):
            if self.tensors is not None:
                missing = model.load_state_dict(self.tensors, strict=self.classes is not None).missing_keys
            else:
                missing = _load_npz(model, self.path)
        if missing:
            raise ValueError(f"{self.flag} {self.path} does not fit the model: it lacks {listing(missing)}")


def read_weights(path: str, flag: str, model: nn.Module, create: Callable[..., nn.Module], classes: int) -> WeightsFile:
    """Read a file of weights, adapted as timm adapts pretrained weights if it does not fit as it is.

    Args:
        path: A .safetensors file, a PyTorch checkpoint of tensors alone, or the .npz of the authors of ViT or BiT.
        flag: The option by which it was given, for messages.
        model: The model with `classes` outputs; its values are not read.
        create: timm.create_model with the arguments of the model, except for the number of classes.
        classes: Number of classes of `model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, if timm cannot adapt it, or if it has classifiers of different sizes.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path!r} ({flag})")
    if path.lower().endswith(".npz"):
        with failures(f"cannot read {flag} {path}"), np.load(path, allow_pickle=False) as arrays:
            outputs = [arrays[name].shape[-1] for name in arrays.files if name.endswith(_NPZ_HEADS)]
        return WeightsFile(path, flag, _only(outputs, path), None, {"checkpoint_path": path})
    with failures(f"cannot read {flag} {path}"):
        tensors: Mapping[str, Tensor] = load_state_dict(path)
    heads = [f"{head}.weight" for head in head_modules(model)]
    fits = _fits(tensors, model, heads)
    overlay: dict[str, Any] = {"file": path, "source": "", "custom_load": False, "num_classes": classes}
    arguments: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if not fits:
        config: Any = model.pretrained_cfg
        if config["input_size"][0] == 1:  # timm reduces weights for colour images only if told that they are
            arguments["in_chans"] = 1
            overlay["input_size"] = (3, *config["input_size"][1:])
        with failures(f"{flag} {path} does not fit the model, and timm cannot adapt it"):
            tensors = _adapted(create, {**arguments, "num_classes": classes})
    found = _only((len(tensors[head]) for head in heads if head in tensors), path)
    overlay["num_classes"] = -1 if found is None else found
    if fits:
        arguments = {} if found is None else {"checkpoint_path": path}
    return WeightsFile(path, flag, found, tensors, arguments)


def _fits(tensors: Mapping[str, Tensor], model: nn.Module, heads: Iterable[str]) -> bool:
    """Return whether the names and shapes are the model's, but for the classifier, and others if there is none."""
    needed = model.state_dict()
    if any(head in tensors for head in heads) and tensors.keys() - needed:
        return False
    in_head = tuple(head.removesuffix("weight") for head in heads)
    return all(
        name in tensors and getattr(tensors[name], "shape", None) == value.shape
        for name, value in needed.items()
        if not name.startswith(in_head)
    )


def _adapted(create: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what timm would load into a model.

    timm's functions for this are private to each family of models. So it creates one, whose loading is intercepted; by
    itself, it would let parts of the model keep their random values wherever the number of classes differs.
    """
    result = SimpleNamespace(missing_keys=[], unexpected_keys=[])
    intercepted = mock.patch.object(nn.Module, "load_state_dict", autospec=True, return_value=result)
    with without_logs(), without_draws(), intercepted as load:
        create(**arguments)
    return dict(load.call_args.args[1])


def _load_npz(model: nn.Module, path: str) -> list[str]:
    """Load an .npz in place; return the names of parameters that it lacks."""
    from timm.models import load_checkpoint

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(nan)
    load_checkpoint(model, path)
    return [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def _only(outputs: Iterable[int], path: str) -> int | None:
    """Return the one number of classes, or None for none."""
    found = sorted(set(outputs))
    if len(found) > 1:
        raise ValueError(f"{path} has classifiers of {listing(map(str, found))} classes")
    return found[0] if found else None
