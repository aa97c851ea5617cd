"""Layers whose output a model does not use, by its configuration: adapters there would never receive a gradient.

Vision-language models of transformers (LLaVA and its relatives) read the features of the vision tower before its last
layers: ``vision_feature_layer=-2`` leaves the last layer out of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from randlora_vision.layers.peft_around import plain_modules

_SETTINGS = ("vision_feature_layer", "vision_feature_layers")


def unused_layers(model: nn.Module) -> Mapping[str, str]:
    """Return the path of each layer of a vision tower that cannot reach the output, and the reason."""
    config = getattr(model, "config", None)
    for setting in _SETTINGS:
        chosen = getattr(config, setting, None)
        indices = [chosen] if isinstance(chosen, int) else chosen
        if indices and isinstance(indices, Sequence) and all(isinstance(index, int) for index in indices):
            path, layers = _layers(model, type(getattr(config, "vision_config", None)))
            # hidden_states[0] is the embedding, and hidden_states[k] the output of layer k - 1.
            used = max(index % (len(layers) + 1) for index in indices)
            reason = f"its output is not used: {setting}={chosen}"
            return {f"{path}.{number}": reason for number in range(used, len(layers))}
    return {}


def _layers(model: nn.Module, config: type) -> tuple[str, Sequence[nn.Module]]:
    """The longest list of modules in the vision tower, with its path; empty if there is no such tower."""
    paths = dict(plain_modules(model))
    towers = [path for path, module in paths.items() if path and type(getattr(module, "config", None)) is config]
    lists = [
        (path, list(module))
        for path, module in paths.items()
        if isinstance(module, nn.ModuleList) and any(path.startswith(f"{tower}.") for tower in towers)
    ]
    return max(lists, key=lambda found: len(found[1]), default=("", []))
