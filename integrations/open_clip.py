"""open_clip: which weights of a CLIP-like model RandLoRA adapts.

    inject(model, RandLoRAConfig(rank=32, target_modules="open_clip:vision"))

The presets `vision`, `text` and `both` follow one rule, whatever the model is called: every
attention and MLP weight of the tower's body and of its attention pooling. Left out are the patch
embedding or stem, the classifier and the projection into the shared space, and matrices too narrow
to be a projection of tokens. In a tower whose body holds more weights in convolutions than in linear
layers (ResNet, MobileCLIP), its ungrouped convolutions are adapted too.
"""

from collections.abc import Callable, Mapping

from torch import nn

from randlora_vision.integrations.export import merged as _merged
from randlora_vision.integrations.presets.towers import body, by_majority, configured


def vision_targets(model: nn.Module) -> list[str]:
    """Return the target names of the vision tower, in the model's order."""
    _require_open_clip(model)
    visual = model.get_submodule("visual")
    path = "visual.trunk" if isinstance(getattr(visual, "trunk", None), nn.Module) else "visual"
    return _tower_targets(model, path)


def text_targets(model: nn.Module) -> list[str]:
    """Return the target names of the text tower, in the model's order (of CoCa: not its decoder's)."""
    _require_open_clip(model)
    return _tower_targets(model, _text_path(model))


def both_targets(model: nn.Module) -> list[str]:
    """Return the target names of the vision tower, then those of the text tower."""
    return vision_targets(model) + text_targets(model)


PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "vision": vision_targets,
    "text": text_targets,
    "both": both_targets,
}
save_merged = _merged.save_merged_file


def _text_path(model: nn.Module) -> str:
    # The classic CLIP class keeps the text tower's parts at its own root, all others in `text`.
    return "text.transformer" if isinstance(getattr(model, "text", None), nn.Module) else "transformer"


def _require_open_clip(model: nn.Module) -> None:
    """Raise ValueError unless the model has an open_clip model's two towers."""
    encoders = all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text"))
    modules = dict(model.named_modules())
    if not (encoders and "visual" in modules and _text_path(model) in modules):
        raise ValueError(
            "the open_clip presets need a model of open_clip (with encode_image, encode_text, `visual` and "
            f"`{_text_path(model)}`), got {type(model).__name__}; for other models name the target_modules"
        )


def _tower_targets(model: nn.Module, path: str) -> list[str]:
    tower = model.get_submodule(path)
    matrices = by_majority(body(tower, left_out=configured(tower, "classifier")))
    return [f"{path}.{matrix.name}" for matrix in matrices]
