"""Loading any timm classifier, with helpful error messages."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from randlora_vision.errors import failures
from randlora_vision.integrations._timm_weights import WeightsFile, read_weights
from randlora_vision.integrations.timm import head_modules
from randlora_vision.names import close_matches
from randlora_vision.skeletons import skeleton
from randlora_vision.training.classifier.loaded import LoadedClassifier
from randlora_vision.training.classifier.options import ClassifierModel, ModelOptions

_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
# A head of exact zeros passes no gradient back, so the first step could not check the gradients of the adapters.
_HEAD_STD = 1e-3


def load_classifier(options: ClassifierModel, classes: int, seed: int) -> LoadedClassifier:
    """Load a frozen timm model with a head of `classes` outputs.

    The head is new if the weights contain none, as those of self-supervised training, or one for another number of
    classes. Parameters that are not in the weights are drawn with `seed`, so the same call returns the same model.
    Raises ValueError for an unknown model (naming close matches), for weights that do not fit or cannot be downloaded,
    for contradictory numbers of classes, and for a model of images that are neither grey nor in colour.
    """
    if options.num_classes not in (None, classes):
        raise ValueError(f"the data has {classes} classes, but --num-classes says {options.num_classes}: leave it out")
    if not options.model.startswith(_SCHEMES):
        _check_name(options.model)
    arguments: dict[str, Any] = options.arguments
    if options.img_size and _is_fixed(options.model, options.img_size):
        arguments["img_size"] = options.img_size
    if options.pretrained:
        arguments["pretrained"] = True
    file = _weights_file(options, arguments, classes)
    in_weights = file.classes if file else _classes_of_pretrained(options, arguments)
    kept = in_weights == classes and not options.fresh_head
    arguments["num_classes"] = classes
    if file:
        if in_weights not in (None, classes) and not options.fresh_head:
            raise ValueError(
                f"{file.path} has a classifier of {in_weights} classes, but the data has {classes}: "
                "give --fresh-head to start with a new head"
            )
        arguments["num_classes"] = in_weights or 0
    words = "".join(f", {name}={value!r}" for name, value in (arguments | dict(file.arguments if file else {})).items())
    code = ["import timm, torch", f"model = timm.create_model({options.model!r}{words})"]
    if not (options.pretrained or options.initial_checkpoint):
        code.insert(1, f"torch.manual_seed({seed})  # random weights")
    rates = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
    model = _create(options.model, arguments | {name: rate for name, rate in rates.items() if rate}, seed)
    if file:
        if not file.arguments:
            code.append(f"timm.models.load_checkpoint(model, {file.path!r}, strict=False)")
        file.load(model)
    if file and in_weights != classes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.reset_classifier(classes)
        code.append(f"model.reset_classifier({classes})")
    _check_head(model, classes)
    if not kept:
        _renew_head(model, seed)
    model.requires_grad_(False)
    config = _data_config(model, options)
    if config["input_size"][0] not in (1, 3):
        raise ValueError(f"{options.model} takes images of {config['input_size'][0]} channels, not of 1 (grey) or 3")
    return LoadedClassifier(
        model=model,
        data_config=config,
        code=code,
        has_weights=options.pretrained or options.initial_checkpoint is not None,
        fresh_head=not kept,
    )


def with_own_head(options: ClassifierModel, seed: int) -> nn.Module:
    """Return the pretrained model with the head of its weights."""
    return _create(options.model, {"pretrained": True}, seed).requires_grad_(False)


def _create(name: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """Create a timm model. The type is Any because timm models have methods that nn.Module does not declare."""
    import timm

    words = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
    with failures(f"timm cannot create the model {name!r} with {words}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, **arguments)


def _check_name(name: str) -> None:
    import timm

    known = timm.list_models()
    if timm.is_model(name):
        _, _, tag = name.partition(".")
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*") if tag else [name]
        known = [name] if name in tags else tags
    if name not in known:
        close = close_matches(name, known, cutoff=0.5)
        hint = f"; {close}" if close else ""
        raise ValueError(
            f"timm has no model {name!r}{hint} (python -c 'import timm; print(timm.list_models())' "
            "lists them all; hf-hub:ORG/REPO and local-dir:FOLDER work too)"
        )


def _is_fixed(name: str, img_size: int) -> bool:
    import timm

    config = None if name.startswith(_SCHEMES) else timm.get_pretrained_cfg(name)
    if config is not None:
        return config.fixed_input_size
    skeleton(partial(_create, name, {}, seed=0))  # raises if it is not the size that is wrong
    try:
        skeleton(partial(_create, name, {"img_size": img_size}, seed=0))
    except ValueError as error:
        if isinstance(error.__cause__, TypeError):  # it has no such argument: any size will do
            return False
        raise
    return True


def _weights_file(options: ClassifierModel, arguments: Mapping[str, Any], classes: int) -> WeightsFile | None:
    import timm

    if options.initial_checkpoint is None:
        return None
    model = skeleton(partial(_create, options.model, {**arguments, "num_classes": classes}, seed=0))
    create = partial(timm.create_model, options.model, **arguments)
    return read_weights(options.initial_checkpoint, "--initial-checkpoint", model, create, classes)


def _classes_of_pretrained(options: ClassifierModel, arguments: Mapping[str, Any]) -> int | None:
    if not options.pretrained:
        return None
    return int(skeleton(partial(_create, options.model, {**arguments, "pretrained": False}, seed=0)).num_classes)


def _check_head(model: nn.Module, classes: int) -> None:
    if not head_modules(model) or getattr(model, "num_classes", None) != classes:
        raise ValueError(
            f"timm created a {type(model).__name__} without a classifier of {classes} classes: choose another model"
        )


def _renew_head(model: nn.Module, seed: int) -> None:
    """Initialise the last layer of each head with values close to zero."""
    generator = torch.Generator().manual_seed(seed)
    for head in head_modules(model):
        layers = [part for part in model.get_submodule(head).modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
        with torch.no_grad():
            for layer in layers[-1:]:
                layer.weight.copy_(_HEAD_STD * torch.randn(layer.weight.shape, generator=generator))
                if layer.bias is not None:
                    layer.bias.zero_()


def _data_config(model: nn.Module, options: ModelOptions) -> dict[str, Any]:
    """Return the data configuration of the model, with the values that the options give in place of its own."""
    from timm.data import resolve_data_config

    config: dict[str, Any] = resolve_data_config({}, model=model)
    if options.img_size:
        config["input_size"] = (config["input_size"][0], options.img_size, options.img_size)
    for name in ("mean", "std"):
        if values := getattr(options, name):
            config[name] = values if len(values) == 3 else values * 3
    given = {"crop_pct": options.crop_pct, "interpolation": options.interpolation}
    return config | {name: value for name, value in given.items() if value is not None}
