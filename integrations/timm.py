"""timm: which weights of a backbone RandLoRA adapts, and the classifier that is trained beside them.

    model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=37)
    config = RandLoRAConfig(rank=32, target_modules="timm:backbone", modules_to_save=head_modules(model))
    inject(model, config)

The presets look at what a model is made of, not at its name:

- ``timm:backbone``: every attention and MLP weight, attention pooling included. In a model whose body holds more
  weights in convolutions than in linear layers (ResNet, EfficientNet, ConvNeXtV2's small ones) its ungrouped
  convolutions, 1x1 and k x k, are adapted too.
- ``timm:attention``: the attention weights alone, those held as 1x1 convolutions included.
- ``timm:conv``: as ``timm:backbone``, with the ungrouped convolutions whatever their share: downsampling of ConvNeXt
  and PVT, the convolutional half of MaxViT and MobileViT.

None of them takes a classifier, a patch embedding or stem, a depthwise or grouped convolution, or a matrix too narrow
to be a projection (tables of position bias, gates). A model made with `features_only` or ``num_classes=0`` is adapted
in the same places, as far as it has them.

What rebuilds layers wants a plain model: ``merge(model)``, ``remove(model)``, and only then `reparameterize_model`,
`fuse` or `reset_classifier`. For features of an adapted classifier without that, timm's own ``forward_features``,
``forward_intermediates`` and ``forward_head(..., pre_logits=True)`` show the adapter.

BatchNorm statistics that move in training belong to no adapter file: a reloaded ResNet would differ from the trained
one. Hold them before `inject` with ``timm.layers.freeze_batch_norm_2d(model)``, or keep these layers in eval mode.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

import randlora_vision
from randlora_vision import InjectionReport
from randlora_vision.files import adapter_file as fileformat
from randlora_vision.injection.candidates import candidates
from randlora_vision.integrations.export import merged as _merged
from randlora_vision.integrations.presets import towers as _towers
from randlora_vision.integrations.presets.towers import Matrix

# What timm calls an attention: by attribute or class, or by the class's acronym (SHSA, XCA, GPSA, LiteMLA).
_ATTENTION = re.compile(r"(?i:att(n|ention))|(SA|XCA|MLA|MHCA)$")


def backbone_targets(model: nn.Module) -> list[str]:
    """The attention and MLP weights, or where convolutions hold most of the body's weights, these too."""
    return [matrix.name for matrix in _towers.by_majority(_body(model))]


def attention_targets(model: nn.Module) -> list[str]:
    """The attention weights, whether linear layers or convolutions hold them."""
    paths = dict(model.named_modules())
    return [matrix.name for matrix in _body(model) if _towers.in_attention(matrix.name, paths, _ATTENTION)]


def conv_targets(model: nn.Module) -> list[str]:
    """The attention and MLP weights and the ungrouped convolutions."""
    return [matrix.name for matrix in _body(model)]


PRESETS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "backbone": backbone_targets,
    "attention": attention_targets,
    "conv": conv_targets,
}
save_merged = _merged.save_merged_file


def head_modules(model: nn.Module) -> list[str]:
    """The classifier's modules: what to pass as `modules_to_save` so that it is trained and saved with an adapter.

    Returns:
        Their paths: ``["head"]`` of a ViT, ``["head.fc"]`` of ConvNeXt, ``["head", "head_dist"]`` of a distilled DeiT;
        none for a model made with ``num_classes=0``.

    Raises:
        ValueError: If the model is not one of timm's classifiers.
    """
    if not callable(getattr(model, "get_classifier", None)):
        raise ValueError(f"{type(model).__name__} has no get_classifier: head_modules needs a classifier of timm")
    return _classifiers(model)


def num_classes(path: str | os.PathLike[str]) -> int | None:
    """How many classes an adapter file's classifier tells apart; None if it holds no classifier.

    ``timm.create_model(name, num_classes=num_classes("adapter.safetensors"))`` makes the model that the file fits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no adapter, or the modules saved with it do not have one number of outputs.
    """
    saved = _read(path)
    found = _outputs(saved)
    if len(found) > 1:
        raise ValueError(f"{path}: cannot tell the number of classes from {', '.join(saved)}")
    return found.pop() if found else None


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", trainable: bool = False
) -> InjectionReport:
    """As `randlora_vision.load_adapter`; a model with another number of classes than the file is told so.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the numbers of classes differ, or as `randlora_vision.load_adapter` does.
    """
    heads = [*_classifiers(model), *_towers.configured(model, "classifier")]
    found = _outputs({name: t for name, t in _read(path).items() if any(name.startswith(f"{h}.") for h in heads)})
    in_model = getattr(model, "num_classes", 0)
    if len(found) == 1 and in_model not in found:
        raise ValueError(
            f"{path} holds a classifier of {found.pop()} classes and this {type(model).__name__} has {in_model}: "
            "make the model with the file's number, timm.create_model(..., num_classes=num_classes(path))"
        )
    return randlora_vision.load_adapter(model, path, adapter_name, trainable)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors that an adapter file's modules trained in full hold."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no adapter file {str(path)!r}")
    return fileformat.read(Path(path)).saved


def _outputs(saved: Mapping[str, Tensor]) -> set[int]:
    """The numbers of outputs of a head's last layers."""
    shapes = [tensor.shape for name, tensor in saved.items() if name.endswith("weight") and tensor.ndim >= 2]
    # A hidden layer has as many outputs as the next one has inputs.
    return {shape[0] for shape in shapes} - {shape[1] for shape in shapes}


def _classifiers(model: nn.Module, prefix: str = "") -> list[str]:
    """The paths of what a timm model calls its classifier, the outermost ones; a headless model has none."""
    get = getattr(model, "get_classifier", None)
    try:
        classifier = get() if callable(get) else ()
    except AttributeError:  # a model pruned for its features
        classifier = ()
    modules = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    known = _towers.configured(model, "classifier")
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
    # CLIP's ResNets keep their attention pooling, classifier included, under the name of a head.
    heads = {c.name for c in candidates(model) if c.head and not _towers.in_attention(c.name, paths, _ATTENTION)}
    return _towers.body(model, heads.union(*(_classifiers(module, path) for path, module in paths.items())))
