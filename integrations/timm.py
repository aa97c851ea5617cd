"""timm: presets for the weights of a backbone that RandLoRA adapts, and the classifier trained with them.

    model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=37)
    config = RandLoRAConfig(rank=32, target_modules="timm:backbone", modules_to_save=head_modules(model))
    inject(model, config)

The presets depend on the structure of a model, not on its name:

- ``timm:backbone``: every attention and MLP weight, including attention pooling. If the body of a model has more
  weights in convolutions than in linear layers (ResNet, EfficientNet, small ConvNeXtV2 models), its ungrouped
  convolutions, 1x1 and k x k, are adapted too.
- ``timm:attention``: only the attention weights, including those stored as 1x1 convolutions.
- ``timm:conv``: ``timm:backbone`` plus all ungrouped convolutions, whatever their share of the weights: downsampling
  in ConvNeXt and PVT, the convolutional half of MaxViT and MobileViT.

No preset includes classifiers, patch embeddings or stems, depthwise or grouped convolutions, or matrices that are too
narrow to be projections (position bias tables, gates). In a model created with `features_only` or ``num_classes=0``,
the same layers are adapted as far as they exist.

Functions that rebuild layers need a plain model: call ``merge(model)`` and ``remove(model)`` before
`reparameterize_model`, `fuse` or `reset_classifier`. To get features from an adapted classifier without that, use
timm's ``forward_features``, ``forward_intermediates`` and ``forward_head(..., pre_logits=True)``: they include the
adapter.

BatchNorm statistics that change in training are not saved in an adapter file, so a reloaded ResNet would differ from
the trained one. Freeze them before `inject` with ``timm.layers.freeze_batch_norm_2d(model)``, or keep these layers in
eval mode.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

import randlora_vision
from randlora_vision import InjectionReport
from randlora_vision.files import adapter_file
from randlora_vision.injection.candidates import candidates
from randlora_vision.integrations.export import merged as _merged
from randlora_vision.integrations.presets import towers as _towers
from randlora_vision.integrations.presets.towers import Matrix
from randlora_vision.names import listing

# Names of attention modules in timm: of the attribute or class, or the acronym of the class (SHSA, XCA, GPSA, LiteMLA).
_ATTENTION = re.compile(r"(?i:att(n|ention))|(SA|XCA|MLA|MHCA)$")


def backbone_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights, and the convolutions too where they hold most of the body's weights."""
    return [matrix.name for matrix in _towers.by_majority(_body(model))]


def attention_targets(model: nn.Module) -> list[str]:
    """Return the attention weights, stored in linear layers or in convolutions."""
    paths = dict(model.named_modules())
    return [matrix.name for matrix in _body(model) if _towers.in_attention(matrix.name, paths, _ATTENTION)]


def conv_targets(model: nn.Module) -> list[str]:
    """Return the attention and MLP weights and the ungrouped convolutions."""
    return [matrix.name for matrix in _body(model)]


PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "backbone": backbone_targets,
    "attention": attention_targets,
    "conv": conv_targets,
}
save_merged = _merged.save_merged_file


def head_modules(model: nn.Module) -> list[str]:
    """Return the classifier's modules, to be passed as `modules_to_save` so that they are trained with an adapter.

    Returns:
        Their paths: ``["head"]`` for ViT, ``["head.fc"]`` for ConvNeXt, ``["head", "head_dist"]`` for a distilled DeiT;
        empty for a model created with ``num_classes=0``.

    Raises:
        ValueError: If the model is not one of timm's classifiers.
    """
    if not callable(getattr(model, "get_classifier", None)):
        raise ValueError(f"{type(model).__name__} has no get_classifier: head_modules needs a timm classifier")
    return _classifiers(model)


def num_classes(path: str | os.PathLike[str]) -> int | None:
    """Return the number of classes of the classifier in an adapter file; None if it holds no classifier.

    ``timm.create_model(name, num_classes=num_classes("adapter.safetensors"))`` creates the model that the file fits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an adapter file, or the saved modules have different numbers of outputs.
    """
    saved = _read(path)
    found = _outputs(saved)
    if len(found) > 1:
        raise ValueError(f"{path}: cannot tell the number of classes from {listing(saved)}")
    return found.pop() if found else None


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", trainable: bool = False
) -> InjectionReport:
    """Load an adapter as `randlora_vision.load_adapter` does, and check that the numbers of classes agree.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the numbers of classes differ, or as `randlora_vision.load_adapter` does.
    """
    heads = [*_classifiers(model), *_towers.configured(model, "classifier")]
    found = _outputs({name: t for name, t in _read(path).items() if any(name.startswith(f"{h}.") for h in heads)})
    in_model = getattr(model, "num_classes", 0)
    if len(found) == 1 and in_model not in found:
        raise ValueError(
            f"{path} holds a classifier of {found.pop()} classes, but this {type(model).__name__} has {in_model}: "
            "create the model with the file's number, timm.create_model(..., num_classes=num_classes(path))"
        )
    return randlora_vision.load_adapter(model, path, adapter_name, trainable)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of the modules trained in full in an adapter file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no adapter file {str(path)!r}")
    return adapter_file.read(Path(path)).saved


def _outputs(saved: Mapping[str, Tensor]) -> set[int]:
    """The numbers of outputs of the last layers of a head."""
    shapes = [tensor.shape for name, tensor in saved.items() if name.endswith("weight") and tensor.ndim >= 2]
    # A hidden layer has as many outputs as the next one has inputs.
    return {shape[0] for shape in shapes} - {shape[1] for shape in shapes}


def _classifiers(model: nn.Module, prefix: str = "") -> list[str]:
    """The paths of the outermost modules of a timm model's classifier; empty for a headless model."""
    get = getattr(model, "get_classifier", None)
    try:
        classifier = get() if callable(get) else ()
    except AttributeError:  # a model pruned to a feature extractor
        classifier = ()
    modules = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    known = _towers.configured(model, "classifier")
    if not modules and not known:
        return []
    paths = [
        path
        for path, module in model.named_modules()
        if path
        and (path in known or any(module is part for part in modules))
        and any(True for _ in module.parameters())
    ]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return [f"{prefix}.{path}".lstrip(".") for path in outermost]


def _body(model: nn.Module) -> list[Matrix]:
    paths = dict(model.named_modules())
    # CLIP's ResNets keep their attention pooling, with the classifier in it, under the name of a head.
    heads = {c.name for c in candidates(model) if c.head and not _towers.in_attention(c.name, paths, _ATTENTION)}
    models = [
        (path, m) for path, m in paths.items() if hasattr(type(m), "get_classifier") or "pretrained_cfg" in vars(m)
    ]
    return _towers.body(model, heads.union(*(_classifiers(module, path) for path, module in models)))
