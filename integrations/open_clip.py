"""open_clip: presets for the weights of a CLIP-like model that RandLoRA adapts.

    inject(model, RandLoRAConfig(rank=32, target_modules="open_clip:vision"))

The presets `vision`, `text` and `both` follow one rule for all models: they choose every attention and
MLP weight of the tower's body and of its attention pooling. They leave out the patch embedding or stem,
the classifier, the projection into the shared space, and matrices that are too narrow to be projections
of tokens. If the body of a tower has more weights in convolutions than in linear layers (ResNet,
MobileCLIP), its ungrouped convolutions are adapted too.
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
    """Return the target names of the text tower, in the model's order (for CoCa, without the decoder)."""
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
    # The classic CLIP class keeps the text tower's parts at the root of the model, all other classes in `text`.
    return "text.transformer" if isinstance(getattr(model, "text", None), nn.Module) else "transformer"


def _require_open_clip(model: nn.Module) -> None:
    """Raise ValueError unless the model has the two towers of an open_clip model."""
    encoders = all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text"))
    modules = dict(model.named_modules())
    if not (encoders and "visual" in modules and _text_path(model) in modules):
        raise ValueError(
            "the open_clip presets need a model of open_clip (with encode_image, encode_text, `visual` and "
            f"`{_text_path(model)}`), got {type(model).__name__}; for other models, list the target_modules"
        )


def _tower_targets(model: nn.Module, path: str) -> list[str]:
    tower = model.get_submodule(path)
    matrices = by_majority(body(tower, left_out=configured(tower, "classifier")))
    return [f"{path}.{matrix.name}" for matrix in matrices]
