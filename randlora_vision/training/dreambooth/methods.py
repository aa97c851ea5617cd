"""The methods of training a pipeline: RandLoRA, PEFT's LoRA in the diffusers file format, or full fine-tuning."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from randlora_vision import RandLoRAConfig, adapter_parameters, check_gradients, inject
from randlora_vision.adapters.refill import refill
from randlora_vision.files import bundle
from randlora_vision.integrations import diffusers as pipelines
from randlora_vision.training.dreambooth.experts import in_this_step
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.lora import LoRAInPipeline
from randlora_vision.training.dreambooth.options import DreamBoothSettings
from randlora_vision.training.methods.adaptation import (
    Adaptation,
    TrainedTensors,
    finite_gradients,
    quiet,
    randlora_config,
    target_names,
    values_restored,
)

_TRAINED = "default"


class PipelineAdaptation(Adaptation, Protocol):
    """A pipeline made trainable by one method. `load` takes the pipeline as its model."""

    def with_saved(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the pipeline uses the saved file instead of the weights in training."""


class RandLoRAInPipeline:
    """RandLoRA in each adapted component, saved in one file."""

    def __init__(self, pipe: Any, configs: Mapping[str, RandLoRAConfig]) -> None:
        self.pipe = pipe
        self.parts: dict[str, nn.Module] = {name: getattr(pipe, name) for name in configs}
        with quiet():
            reports = {name: inject(part, configs[name], _TRAINED) for name, part in self.parts.items()}
        self.report = "\n\n".join(f"{name}\n{report}" for name, report in reports.items())

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield lambda and gamma of every adapted weight."""
        for part, module in self.parts.items():
            for name, parameter in adapter_parameters(module, _TRAINED):
                yield f"{part}.{name}", parameter

    def check_gradients(self) -> list[str]:
        """Check the gradients of every component; raise ValueError if one of them cannot learn."""
        notes = []
        for name in in_this_step(self.parts):
            try:
                notes += [f"{name}: {note}" for note in check_gradients(self.parts[name])]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return notes

    def save(self, path: Path) -> None:
        """Write the adapter file."""
        pipelines.save_adapter(self.pipe, path, _TRAINED)

    def start_from(self, path: Path) -> None:
        """Copy the values of an adapter file."""
        contents = bundle.read(path)
        if set(contents) == {""} and len(self.parts) == 1:  # a file of the denoiser alone names no component
            contents = dict(zip(self.parts, contents.values(), strict=True))
        if set(contents) != set(self.parts):
            raise ValueError(f"{path} holds adapters for {', '.join(contents)}, trained are {', '.join(self.parts)}")
        for name, part in self.parts.items():
            refill(part, contents[name], path, _TRAINED)

    def load(self, model: Any, path: Path) -> None:
        """Load the adapter file."""
        with quiet():
            pipelines.load_adapter(model, path)

    def with_saved(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Temporarily replace the trained numbers by those of the file."""
        return values_restored(self, lambda: self.start_from(path))

    def loading_code(self, path: Path) -> list[str]:
        """Return the code that calls `load_adapter` of the diffusers integration."""
        return [
            "from randlora_vision.integrations.diffusers import load_adapter",
            f"load_adapter(pipe, {str(path)!r})",
        ]


class FullInPipeline(TrainedTensors):
    """Full fine-tuning of the trained components; tensor names start with the name of the component."""

    def __init__(self, pipe: Any, components: Sequence[str]) -> None:
        container = components_of(pipe, components)
        names = [name for name, _ in container.named_parameters()]
        super().__init__(container, names, f"full fine-tuning of {' and '.join(components)}", ())
        self.components = list(components)

    def check_gradients(self) -> list[str]:
        """Require finite gradients of the components that had items."""
        used = in_this_step(dict(self.model.named_children()))
        return finite_gradients((name, p) for name, p in self.parameters() if name.partition(".")[0] in used)

    def load(self, model: Any, path: Path) -> None:
        """Copy the tensors of the file into the components of the pipeline."""
        super().load(components_of(model, self.components), path)

    def with_saved(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Temporarily replace the trained tensors by those of the file."""
        return values_restored(self, lambda: TrainedTensors.load(self, self.model, path))

    def loading_code(self, path: Path) -> list[str]:
        """Return the code that loads the file with safetensors and PyTorch."""
        lines = ["from safetensors.torch import load_file", f"tensors = load_file({str(path)!r})"]
        for name in self.components:
            own = f"{{k.removeprefix('{name}.'): v for k, v in tensors.items() if k.startswith('{name}.')}}"
            lines.append(f"pipe.{name}.load_state_dict({own}, strict=False)")
        return lines


def components_of(pipe: Any, names: Sequence[str]) -> nn.ModuleDict:
    """Return the named components of a pipeline as one module."""
    return nn.ModuleDict({name: getattr(pipe, name) for name in names})


def trained_components(family: Family, settings: DreamBoothSettings) -> list[str]:
    """Return the names of the trained components, the denoisers first; raise ValueError if it cannot be."""
    texts = [name for name in family.trainable_text_encoders if getattr(family.pipe, name) is not None]
    if settings.pipeline.train_text_encoder and not texts:
        raise ValueError("--train-text-encoder: this pipeline has no CLIP text encoder")
    if settings.adapter.method == "lora" and not hasattr(family.pipe, "load_lora_weights"):
        raise ValueError(f"diffusers loads no LoRA into a {family.pipeline}: give --method randlora")
    return [*family.trained_denoisers, *(texts if settings.pipeline.train_text_encoder else ())]


def adapt(family: Family, settings: DreamBoothSettings) -> PipelineAdaptation:
    """Prepare a pipeline for the chosen method and freeze all other weights."""
    adapter, pipe = settings.adapter, family.pipe
    names = trained_components(family, settings)
    if adapter.method == "full":
        return FullInPipeline(pipe, names)
    configs = adapter_configs(family, settings)
    if adapter.method == "randlora":
        return RandLoRAInPipeline(pipe, configs)
    targets = {name: target_names(getattr(pipe, name), config) for name, config in configs.items()}
    assert adapter.rank is not None and adapter.alpha is not None, "resolve fills them in"
    return LoRAInPipeline(pipe, targets, adapter.rank, adapter.alpha)


def adapter_configs(family: Family, settings: DreamBoothSettings) -> dict[str, RandLoRAConfig]:
    """Return the configuration of the adapter of each trained component."""
    return {name: _config(settings, family, name) for name in trained_components(family, settings)}


def _config(settings: DreamBoothSettings, family: Family, name: str) -> RandLoRAConfig:
    adapter, seed = settings.adapter, settings.training.seed
    if name not in family.denoisers:  # --target-modules applies only to the denoiser
        return randlora_config(replace(adapter, target_modules=()), seed, "diffusers:text")
    adapter = replace(adapter, exclude_modules=(*adapter.exclude_modules, *family.without_effect))
    return randlora_config(adapter, seed, "diffusers:attention")


def checkpoint_activations(parts: Iterable[nn.Module]) -> None:
    """Turn on gradient checkpointing in denoisers (diffusers) and text encoders (transformers)."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    for part in parts:
        next(method for name in names if (method := getattr(part, name, None)))()
