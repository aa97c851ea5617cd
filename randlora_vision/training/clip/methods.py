"""The methods of training a CLIP model, and their layer-wise learning rates."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from randlora_vision import RandLoRAConfig
from randlora_vision.integrations._open_clip_models import LoadedClip
from randlora_vision.training.clip.classifier import PROBE, ClipClassifier, belongs_to, set_class_features
from randlora_vision.training.clip.options import ClipOptions, ClipSettings
from randlora_vision.training.harness.memory import checkpoint_activations
from randlora_vision.training.harness.optim import (
    AS_THE_ONE_BEFORE,
    Layers,
    Rate,
    layer_rates,
    layers_by,
    matcher,
)
from randlora_vision.training.methods.adaptation import (
    Adaptation,
    RandLoRA,
    TrainedTensors,
    randlora_config,
    target_names,
)
from randlora_vision.training.methods.lora import LoRA
from randlora_vision.training.methods.rivals import RivalAdaptation

_FULL_CODE = (
    "from safetensors.torch import load_file",
    "model.load_state_dict(load_file({path!r}), strict=False)",
)
_PROBE_CODE = (
    "from safetensors.torch import load_file",
    "class_features = load_file({path!r})['class_features']",
)


def adapt(
    clip: LoadedClip, class_names: Sequence[str] | None, settings: ClipSettings
) -> tuple[ClipClassifier | None, Adaptation]:
    """Prepare the model for the chosen method and freeze all other weights; return the classifier and the adaptation.

    The linear probe trains the weights of the classifier; the other methods train weights of the model, and with
    `probe_lr` the classifier too. The classifier is None for data without classes.
    """
    probe, images = settings.adapter.method == "linear-probe", settings.images
    together = settings.adapter.probe_lr is not None
    if together and class_names is not None:
        set_class_features(clip.model, ClipClassifier(clip, class_names, images.templates).prompt_features())
    adaptation = None if probe else _adapt_model(clip.model, settings)
    classifier = None
    if class_names is not None:
        classifier = ClipClassifier(clip, class_names, images.templates, images.prompts, probe or together)
    if adaptation is None:
        assert classifier is not None, "a probe needs classes: resolve checks this"
        adaptation = TrainedTensors(classifier, [PROBE], "linear classifier", _PROBE_CODE)
    return classifier, adaptation


def _adapt_model(model: nn.Module, settings: ClipSettings) -> Adaptation:
    adapter = settings.adapter
    if adapter.method == "randlora":
        return RandLoRA(model, config_of(settings, _whole(model, settings)))
    if adapter.method != "full":
        assert adapter.rank is not None, "resolve fills it in"
        targets, alpha = adapter_targets(model, settings), adapter.alpha or adapter.rank
        if adapter.method == "lora":
            return LoRA(model, targets, adapter.rank, alpha, _whole(model, settings))
        seed, whole = settings.training.seed, _whole(model, settings)
        return RivalAdaptation(model, adapter.method, targets, adapter.rank, alpha, seed, whole)
    towers = _towers(settings)
    # Token embeddings stay frozen: the prompts use few of their rows, and training them slows down every step.
    tables = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    names = [
        name
        for name, _ in model.named_parameters()
        if name not in tables and any(belongs_to(name, tower) for tower in towers)
    ]
    names += _whole(model, settings)
    return TrainedTensors(model, names, f"full fine-tuning ({' and '.join(towers)} tower)", _FULL_CODE)


def adapter_targets(model: nn.Module, options: ClipOptions) -> list[str]:
    """Return the names of the weights that an adapter changes."""
    return target_names(model, config_of(options))


def config_of(options: ClipOptions, modules_to_save: Iterable[str] = ()) -> RandLoRAConfig:
    """Return the RandLoRA configuration for the options."""
    preset = f"open_clip:{options.clip.towers}"
    return randlora_config(options.adapter, options.training.seed, preset, modules_to_save)


def checkpoint_towers(model: nn.Module, options: ClipOptions) -> None:
    """Turn on activation checkpointing in the adapted towers; raise ValueError if a tower does not support it."""
    for tower in _towers(options):
        checkpoint_activations(model, f"the {tower} tower", partial(belongs_to, tower=tower))


def _towers(options: ClipOptions) -> tuple[str, ...]:
    return ("vision", "text") if options.clip.towers == "both" else (options.clip.towers,)


def own_rates(model: Any, settings: ClipSettings) -> dict[nn.Parameter, float]:
    """Return the learning rates that differ from the default, by parameter of an open_clip model."""
    decay, scale_lr = settings.rates.layer_decay, settings.clip.logit_scale_lr
    rates = layer_rates(model, clip_layers(model), settings.training.lr, decay) if decay != 1 else {}
    if scale_lr is not None:
        rates |= {model.get_parameter(name): Rate(scale_lr, "logit_scale") for name in _scalars(model, settings)}
    if settings.adapter.probe_lr is not None:
        rates[model.get_parameter(PROBE)] = Rate(settings.adapter.probe_lr, "classifier")
    return rates


def _whole(model: nn.Module, settings: ClipSettings) -> list[str]:
    """Return the names of the parameters that are trained in full beside an adapter."""
    return [*_scalars(model, settings), *([PROBE] if settings.adapter.probe_lr is not None else [])]


def _scalars(model: nn.Module, settings: ClipSettings) -> list[str]:
    """Return the names of the trained logit scale and bias. Only the SigLIP loss depends on the bias."""
    if not settings.clip.train_logit_scale:
        return []
    with_bias = settings.loss.loss == "siglip" and getattr(model, "logit_bias", None) is not None
    return ["logit_scale", "logit_bias"] if with_bias else ["logit_scale"]


# Layers of an open_clip tower that is not a timm model: the stem before the blocks, the blocks, and a norm after them,
# which counts as part of the last block. Everything else is the last layer. Names are relative to the tower.
_CLIP_TOWER: Mapping[str, Any] = {
    "stem": (
        r"(?:conv\d|bn\d|class_embedding|cls_emb|positional_embedding|token_embedding|ln_pre|"
        r"transformer\.(?:\w+\.)*(?:embeddings|embed_tokens|shared))\b"
    ),
    "blocks": [
        (r"layer(\d)\.(\d+)\.", None),  # open_clip's ResNets
        # open_clip's and Hugging Face's transformers
        (r"transformer\.(?:\w+\.)*?(?:resblocks|layers?|blocks?|h)\.(\d+)\.", None),
        (r"(?:ln_post|ln_final|transformer\.(?:\w+\.)*\w*norm)\b", AS_THE_ONE_BEFORE),
    ],
}


def clip_layers(model: Any) -> list[Layers]:
    """Return the layers of each tower of an open_clip model, the projection last, without what is outside both."""
    trunk, text = (getattr(*place, None) for place in ((model.visual, "trunk"), (model, "text")))
    if trunk is None:
        vision = layers_by(model.visual, _CLIP_TOWER, "visual.")
    else:
        layers = layers_by(trunk, matcher(trunk), "visual.trunk.")
        end = max(layers.values()) + 1
        vision = {**layers, **{f"visual.head.{name}": end for name, _ in model.visual.head.named_parameters()}}
    words = layers_by(model, _CLIP_TOWER) if text is None else layers_by(text, _CLIP_TOWER, "text.")
    return [vision, {name: layer for name, layer in words.items() if belongs_to(name, "text")}]
