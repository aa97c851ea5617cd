"""The base model of a command: a name, folder or repository, from timm, open_clip or diffusers."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import randlora_vision
from randlora_vision import InjectionReport
from randlora_vision.errors import failures
from randlora_vision.files.untrusted import read_json
from randlora_vision.integrations import timm as timm_adapters
from randlora_vision.integrations._download import download
from randlora_vision.integrations._timm_weights import read_weights
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import close_matches
from randlora_vision.skeletons import skeleton

HELP = (
    "a timm model (its name, hf-hub:..., local-dir:...), open_clip:NAME (or a .json configuration), or a diffusers "
    "folder or repository (diffusers:NAME if the name is ambiguous)"
)
_LIBRARIES = ("timm", "open_clip", "diffusers")
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Base:
    """A base model that is not built yet."""

    library: str  # "timm", "open_clip" or "diffusers"
    name: str  # in the library
    weights: str | None = None  # a checkpoint or tag, "pretrained" for timm; None: random, or those of diffusers
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments for timm.create_model

    @property
    def has_weights(self) -> bool:
        """False if the model would have random weights."""
        return self.library == "diffusers" or self.weights is not None or self.name.startswith(_SCHEMES)

    def build(self, adapter: Path | None = None) -> Any:
        """Build the model, in eval mode, or the pipeline, on the CPU; raise ValueError if that is not possible.

        The classifier in the file `adapter` determines the number of classes of a timm model.
        """
        if self.library == "open_clip":
            return self._open_clip().eval()
        if self.library == "diffusers":
            return self._pipeline()
        options = dict(self.options)
        classes = timm_adapters.num_classes(adapter) if adapter is not None and adapter.is_file() else None
        if classes is not None:
            options.setdefault("num_classes", classes)
        own_head = adapter is None or (adapter.is_file() and classes is None)
        return self._timm(options, own_head=own_head).eval()

    def skeleton(self, component: str | None) -> nn.Module:
        """Build the model, or a component of the pipeline (None: its denoiser), without weights, on the meta device."""
        if component is not None and self.library != "diffusers":
            raise ValueError(f"--component is for diffusers pipelines, but {self.library}:{self.name} is one model")
        if self.library == "diffusers":
            return skeleton(lambda: self._component(component))
        bare = Base(self.library, self.name, None, self.options)
        return skeleton(bare._open_clip if self.library == "open_clip" else lambda: bare._timm(dict(self.options)))

    def attach(self, host: Any, adapter: Path) -> list[InjectionReport]:
        """Load an adapter file, or a PEFT folder, into a built model."""
        if self.library == "diffusers":
            from randlora_vision.integrations import diffusers

            return list(diffusers.load_adapter(host, adapter).values())
        if self.library == "timm" and adapter.is_file():
            return [timm_adapters.load_adapter(host, adapter)]
        return [randlora_vision.load_adapter(host, adapter)]

    def _timm(self, options: dict[str, Any], own_head: bool = True) -> nn.Module:
        """Build a timm model; without `own_head`, an adapter will replace its classifier."""
        timm = _library("timm")
        if not self.name.startswith(_SCHEMES) and not timm.is_model(self.name.partition(".")[0]):
            hint = close_matches(self.name, timm.list_models(), cutoff=0.5)
            raise ValueError(f"timm has no model {self.name!r}, and there is no such folder{hint and f'; {hint}'}")
        if self.weights == "pretrained" or (self.weights is None and self.name.startswith(_SCHEMES)):
            options["pretrained"] = not _on_meta()
        elif self.weights is not None:
            return self._timm_from_file(self.weights, options, own_head)
        with failures(f"timm cannot build the model {self.name!r}"):
            return timm.create_model(self.name, **options)

    def _timm_from_file(self, path: str, options: dict[str, Any], own_head: bool) -> nn.Module:
        import timm

        _check_file(path)
        create = partial(timm.create_model, self.name)
        with failures(f"timm cannot build the model {self.name!r}"):
            bare: Any = skeleton(partial(create, **options))
        classes = options.pop("num_classes", None)
        file = read_weights(path, "--weights", bare, partial(create, **options), bare.num_classes)
        if own_head and classes not in (None, file.classes):
            head = f"a classifier of {file.classes} classes" if file.classes else "no classifier"
            raise ValueError(f"--weights {path} has {head}, but --model-args says num_classes {classes}")
        model: Any = create(num_classes=file.classes or 0, **options)
        file.load(model)
        if classes not in (None, file.classes):
            model.reset_classifier(classes)
        return model

    def _open_clip(self) -> nn.Module:
        _library("open_clip")
        from randlora_vision.integrations._open_clip_models import load_clip

        return load_clip(self.name, self.weights, seed=0).model

    def _pipeline(self) -> Any:
        diffusers = _library("diffusers")
        with failures(f"diffusers cannot build the model {self.name!r}"):
            if (Path(self.name) / "config.json").is_file():
                kind, _ = _model_class(diffusers, self.name)
                return kind.from_pretrained(self.name, use_safetensors=True).eval()
            return diffusers.DiffusionPipeline.from_pretrained(self.name, use_safetensors=True)

    def _component(self, component: str | None) -> nn.Module:
        diffusers = _library("diffusers")
        with failures(f"diffusers cannot build the model {self.name!r}"):
            if (Path(self.name) / "config.json").is_file():
                kind, config = _model_class(diffusers, self.name)
                return kind.from_config(config)
            index = _config(self.name, "model_index.json")
        parts = {name: value for name, value in index.items() if _is_model(value)}
        name = component or next((part for part in ("unet", "transformer") if part in parts), None)
        if name not in parts:
            raise ValueError(f"{self.name} has no component {component or 'unet or transformer'!r}: {', '.join(parts)}")
        library, kind_name = parts[name]
        config = _config(self.name, f"{name}/config.json")
        with failures(f"diffusers cannot build the model {self.name!r}"):
            if library == "diffusers":
                return getattr(diffusers, kind_name).from_config(config)
            cls = getattr(_library("transformers"), kind_name)
            return cls(cls.config_class.from_dict(config))


def parse_base(name: str, weights: str | None = None, options: str | None = None) -> Base:
    """Determine a model's library; raise ValueError for options that are not a JSON object or not for it."""
    try:
        arguments = check_type(parse_json(options, options), dict, options) if options else {}
    except ValueError as error:
        raise ValueError(f"--model-args must be a JSON object, got {options!r}: {error}") from None
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _LIBRARIES:
        library, name = prefix, rest
    elif name.endswith(".json"):
        library = "open_clip"
    elif Path(name).is_dir() or ("/" in name and not name.startswith(_SCHEMES)):
        library = "diffusers"
    else:
        library = "timm"
    if library == "diffusers" and weights:
        raise ValueError(f"--weights {weights}: a diffusers model comes with its own weights, leave it out")
    if library != "timm" and arguments:
        raise ValueError("--model-args are arguments for timm.create_model, but this is a model of " + library)
    return Base(library, name, weights, arguments)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        extra = "diffusers" if name == "transformers" else name
        raise ValueError(f"this model needs {name}: pip install 'randlora_vision[{extra}]'") from None


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path!r} (--weights)")
    if not path.endswith(".safetensors"):
        raise ValueError(f"--weights {path}: only .safetensors files are read")


def _config(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a diffusers folder or repository."""
    return read_json(Path(name) / file if Path(name).is_dir() else download(name, file))


def _model_class(diffusers: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """The class of diffusers that a model's config.json names, and the whole configuration."""
    config = _config(folder, "config.json")
    name = check_object(config, {"_class_name": str}, Path(folder) / "config.json")["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(f"its config.json names the class {name!r}, which is not a model of diffusers")
    return kind, config


def _is_model(value: Any) -> bool:
    """True for a [library, class] entry of a model index that names a torch model."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
        return False
    library, kind = value
    unwanted = ("Scheduler", "Autoencoder") if library == "diffusers" else ("Tokenizer", "Processor", "Extractor")
    return library in ("diffusers", "transformers") and not any(word in kind for word in unwanted)


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"
