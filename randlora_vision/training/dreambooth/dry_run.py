"""What a run would need: parameters and bytes of every part and of the adapter, found without loading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loading import family_class, without_values
from randlora_vision.training.dreambooth.methods import adapter_configs, trained_components
from randlora_vision.training.dreambooth.options import DreamBoothSettings
from randlora_vision.training.dreambooth.quantization import BYTES_PER_WEIGHT
from randlora_vision.training.methods.adaptation import target_names
from randlora_vision.training.methods.lora import sides, weight_of
from randlora_vision.training.methods.rivals import trained_numbers

_FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """A component of the pipeline."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Needs:
    """The memory that a run needs, in bytes, without the activations, which depend on the size of the images."""

    parts: tuple[Part, ...]
    trained_numbers: int
    file_bytes: int
    bases_bytes: int
    state_bytes: int
    """The trained numbers, unless they are those of the pipeline itself, their gradients and the optimiser's state."""
    text_bytes: int
    """What is loaded to encode prompts: everything but the denoiser, unless text encoders are trained."""
    training_bytes: int
    """What remains loaded on the device while the denoiser is trained; of an offloaded denoiser, a block."""
    offloaded: str = ""
    """Where an offloaded denoiser is, and how much of it is on the device."""

    @property
    def peak_bytes(self) -> int:
        """The larger of what encoding prompts and training need."""
        return max(self.text_bytes, self.training_bytes)

    def __str__(self) -> str:
        lines = [f"{part.name}: {part.parameters:,} parameters, {_size(part.bytes)}" for part in self.parts]
        lines.append(f"adapter: {self.trained_numbers:,} trained numbers, a file of {_size(self.file_bytes)}")
        lines.append(f"what training adds (trained numbers, gradients, optimiser): {_size(self.state_bytes)}")
        if self.bases_bytes:
            lines.append(f"random bases: {_size(self.bases_bytes)}")
        lines.append(
            f"estimated peak: {_size(self.peak_bytes)}; a step takes {_size(self.training_bytes)} and activations"
        )
        if self.offloaded:
            lines.append(self.offloaded)
        return "\n".join(lines)


def measure(path: str, settings: DreamBoothSettings, dtype: torch.dtype) -> Needs:
    """Return what a run needs, the base in `dtype`; raises as `load_family`, and for targets that match nothing."""
    pipeline, adapter = settings.pipeline, settings.adapter
    family = without_weights(path, settings)
    modules = {name: part for name, part in family.pipe.components.items() if isinstance(part, nn.Module)}
    packed = {*family.denoisers, *family.quantized_texts(modules)} if pipeline.quantize else set()
    sizes = {
        name: _bytes(part, torch.float32 if name == "vae" else dtype, pipeline.quantize if name in packed else None)
        for name, part in modules.items()
    }
    trained = trained_components(family, settings)
    resting = list(dict.fromkeys((*family.denoisers, "vae", *trained)))
    block, offloaded = 0, ""
    if pipeline.offload_base:
        resting = [name for name in resting if name not in family.denoisers]
        block, whole = _block_bytes(family.denoiser, dtype), sum(sizes[name] for name in family.denoisers)
        place, what = "on disk" if pipeline.offload_base == "disk" else "in main memory", " and ".join(family.denoisers)
        offloaded = f"{place}: {_size(whole)} of the {what}, on the device a block of up to {_size(block)}"
    if adapter.method == "full":
        numbers = sum(_count(modules[name]) for name in trained)
        file, bases = _FLOAT32 * numbers, 0
    else:
        configs = adapter_configs(family, settings)
        numbers, file, bases = _adapter(modules, configs, adapter.method, adapter.rank or 0)
    states = 2 if settings.training.use_8bit_adam else 2 * _FLOAT32
    own = 0 if adapter.method == "full" else _FLOAT32
    state = numbers * (own + _FLOAT32 + states)
    return Needs(
        tuple(Part(name, _count(part), sizes[name]) for name, part in modules.items()),
        numbers,
        file,
        bases,
        state,
        sum(size for name, size in sizes.items() if pipeline.train_text_encoder or name not in family.denoisers),
        sum(sizes[name] for name in resting) + block + state + bases,
        offloaded,
    )


def without_weights(path: str, settings: DreamBoothSettings) -> Family:
    """Return the family of a pipeline whose modules are on the meta device, without tokenizers."""
    import diffusers
    import transformers

    hosts = {"diffusers": diffusers, "transformers": transformers}  # others are folders of diffusers.pipelines
    kind, index = family_class(path, settings.pipeline.revision)
    options = {"revision": settings.pipeline.revision} if settings.pipeline.revision else {}
    parts: dict[str, Any] = {}
    for name, home in index.items():
        if not isinstance(home, (list, tuple)) or name in kind.loading:
            continue
        library, part = home
        parts[name] = None
        if library is None:
            continue
        cls = getattr(hosts.get(library) or getattr(diffusers.pipelines, library), part)
        if "Scheduler" in part:
            parts[name] = cls.from_pretrained(path, subfolder=name, **options)
        elif issubclass(cls, nn.Module):
            parts[name] = without_values(cls, path, name, options)
    settings_of_pipe = {name: value for name, value in index.items() if name[0] != "_" and name not in parts}
    pipe = getattr(diffusers, kind.pipeline)(**parts, **{**settings_of_pipe, **kind.loading})
    return kind(pipe, settings.objective, settings.pipeline.max_sequence_length)


def _adapter(
    modules: Mapping[str, nn.Module], configs: Mapping[str, RandLoRAConfig], method: str, rank: int
) -> tuple[int, int, int]:
    if method == "randlora":
        reports = [plan(modules[name], config) for name, config in configs.items()]
        sums = zip(*((r.num_parameters, r.file_bytes, r.bases_bytes) for r in reports), strict=True)
        numbers, file, bases = (sum(values) for values in sums)
        return numbers, file, bases
    shapes = [
        sides(getattr(*weight_of(modules[name], target)))
        for name, config in configs.items()
        for target in target_names(modules[name], config)
    ]
    numbers = trained_numbers("lora", shapes, rank)
    return numbers, _FLOAT32 * numbers, 0


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module, dtype: torch.dtype, quantize: str | None) -> int:
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} if quantize else set()
    each = BYTES_PER_WEIGHT[quantize] if quantize else 0.0
    return round(sum(p.numel() * (each if id(p) in weights else dtype.itemsize) for p in module.parameters()))


def _block_bytes(denoiser: nn.Module, dtype: torch.dtype) -> int:
    """Return the size of the largest part whose activations are recomputed at once: its weights are loaded together."""
    lists = [
        part
        for module in denoiser.modules()
        if hasattr(module, "gradient_checkpointing")
        for part in module.children()
        if isinstance(part, nn.ModuleList)
    ]
    units = [unit for part in lists for unit in part if not hasattr(unit, "gradient_checkpointing")]
    return max((_bytes(unit, dtype, None) for unit in units), default=_bytes(denoiser, dtype, None))


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,} bytes"
