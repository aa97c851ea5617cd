"""Learning rates that fall from the last layer to the first, for weights and for adapters beside them.

Bao et al., BEiT (arXiv 2106.08254). The layers of a timm model are those that timm.optim counts. An adapter's
parameters are named after the module that they sit in, so they are of its layer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from randlora_vision.training.clip_classifier import belongs_to

# Of an open_clip tower that is not timm's: what comes before the blocks, the blocks, and a norm after them, which
# is of the last block. All else is the last layer. Names are those within the tower.
_AS_THE_ONE_BEFORE = (99999,)  # timm's word for it
_CLIP_TOWER: Mapping[str, Any] = {
    "stem": (
        r"(?:conv\d|bn\d|class_embedding|cls_emb|positional_embedding|token_embedding|ln_pre|"
        r"transformer\.(?:\w+\.)*(?:embeddings|embed_tokens|shared))\b"
    ),
    "blocks": [
        (r"layer(\d)\.(\d+)\.", None),  # open_clip's ResNets
        (r"transformer\.(?:\w+\.)*?(?:resblocks|layers?|blocks?|h)\.(\d+)\.", None),  # its own, and Hugging Face's
        (r"(?:ln_post|ln_final|transformer\.(?:\w+\.)*\w*norm)\b", _AS_THE_ONE_BEFORE),
    ],
}

Layers = Mapping[str, int]  # by a parameter's name, its layer, counted from 0


def layer_rates(model: nn.Module, parts: Iterable[Layers], lr: float, decay: float) -> dict[nn.Parameter, float]:
    """Return lr * decay ** (last layer - layer) for every trained parameter of the parts of a model."""
    parameters = dict(model.named_parameters())
    rates = {}
    for layers in parts:
        last = max(layers.values())
        for name, layer in layers.items():
            if parameters[name].requires_grad:
                rates[parameters[name]] = lr * decay ** (last - layer)
    return rates


def timm_layers(model: nn.Module) -> Layers:
    """Return the layers of a timm model, its head the last; raise ValueError for a model that does not tell them."""
    return _layers(model, _matcher(model))


def clip_layers(model: Any) -> list[Layers]:
    """Return the layers of each tower of an open_clip model, its projection the last.

    What is of no tower, such as the logit scale, is left out.
    """
    trunk, text = (getattr(*place, None) for place in ((model.visual, "trunk"), (model, "text")))
    if trunk is None:
        vision = _layers(model.visual, _CLIP_TOWER, "visual.")
    else:
        layers = _layers(trunk, _matcher(trunk), "visual.trunk.")
        end = max(layers.values()) + 1
        vision = {**layers, **{f"visual.head.{name}": end for name, _ in model.visual.head.named_parameters()}}
    words = _layers(model, _CLIP_TOWER) if text is None else _layers(text, _CLIP_TOWER, "text.")
    return [vision, {name: layer for name, layer in words.items() if belongs_to(name, "text")}]


def _layers(part: nn.Module, matcher: Any, prefix: str = "") -> Layers:
    from timm.models import group_parameters

    return {f"{prefix}{name}": layer for name, layer in group_parameters(part, matcher, reverse=True).items()}


def _matcher(model: Any) -> Any:
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"--layer-decay: a {type(model).__name__} does not tell its layers, leave it out")
    return model.group_matcher(coarse=False)
