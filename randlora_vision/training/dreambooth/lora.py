"""PEFT's LoRA in a diffusers pipeline, in the file that `pipe.load_lora_weights` reads.

Only the functional interface of PEFT is used. `add_adapter` of a transformers model calls the same functions, but also
checks the version of PEFT, and transformers 5.24 requires one that did not exist when it was released.

The scripts have a second LoRA (training/methods/lora.py), because neither can replace the other. PEFT wraps layers, so
it cannot adapt the packed attention and the bare projections of open_clip models. The parametrization of
training/methods/lora.py computes every adapted weight in full, so it does not support quantised layers, and a step
costs as much as in full fine-tuning.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.json_values import check_type, parse_json
from randlora_vision.training.dreambooth.experts import in_this_step
from randlora_vision.training.methods.adaptation import copy_tensors, finite_gradients, values_restored

_ADAPTER = "default"


class LoRAInPipeline:
    """LoRA of PEFT on the weights that RandLoRA would adapt."""

    def __init__(self, pipe: Any, targets: Mapping[str, Sequence[str]], rank: int, alpha: float) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig, inject_adapter_in_model

        self.pipe = pipe
        self.parts: dict[str, nn.Module] = {name: getattr(pipe, name) for name in targets}
        self.configs = {
            name: LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths)) for name, paths in targets.items()
        }
        for name, part in self.parts.items():
            part.requires_grad_(False)
            inject_adapter_in_model(self.configs[name], part, _ADAPTER)
            cast_training_params([part], torch.float32)
        self.trained = {
            f"{name}.{path}": parameter
            for name, part in self.parts.items()
            for path, parameter in part.named_parameters()
            if parameter.requires_grad
        }
        numbers = sum(parameter.numel() for parameter in self.trained.values())
        counts = ", ".join(f"{len(paths)} weights of {name}" for name, paths in targets.items())
        self.report = f"PEFT's LoRA of rank {rank}, alpha {alpha:g}, on {counts}: {numbers:,} numbers are trained"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield both factors of every adapted weight."""
        yield from self.trained.items()

    def check_gradients(self) -> list[str]:
        """Check that every component gets a gradient, which may be zero."""
        used = in_this_step(self.parts)
        for name in used:
            first = (p.grad for path, p in self.trained.items() if path.startswith(f"{name}.") and ".lora_B." in path)
            if all(gradient is None for gradient in first):
                raise ValueError(f"no gradient reaches the LoRA of {name}")
        return finite_gradients((path, p) for path, p in self.parameters() if path.partition(".")[0] in used)

    def save(self, path: Path) -> None:
        """Write a LoRA file in the format of diffusers."""
        from peft import get_peft_model_state_dict

        layers = {name: get_peft_model_state_dict(part, adapter_name=_ADAPTER) for name, part in self.parts.items()}
        metadata = {name: config.to_dict() for name, config in self.configs.items()}
        with replacing(path) as temporary:  # `save_lora_weights` of Wan takes one transformer and calls this
            self.pipe._save_lora_weights(temporary.parent, layers, metadata, weight_name=temporary.name)

    def load(self, model: Any, path: Path) -> None:
        """Load the file into a fresh pipeline."""
        from peft import inject_adapter_in_model

        for name, config in self.configs.items():
            inject_adapter_in_model(config, getattr(model, name), _ADAPTER)
        self._copy_in(model, path)

    def start_from(self, path: Path) -> None:
        """Copy the tensors of a file of the same alpha."""
        from peft import get_peft_model_state_dict

        tensors, metadata = read_tensors(path)
        key = "lora_adapter_metadata"
        theirs = check_type(parse_json(metadata.get(key, "{}"), path), dict, path, key)
        for name, config in self.configs.items():
            if (alpha := theirs.get(f"{name}.lora_alpha")) != config.lora_alpha:
                raise ValueError(f"{path} holds a LoRA of alpha {alpha} for {name}, trained is {config.lora_alpha:g}")
        held = {name: get_peft_model_state_dict(part, adapter_name=_ADAPTER) for name, part in self.parts.items()}
        own = {f"{name}.{key}": tensor for name, tensors in held.items() for key, tensor in tensors.items()}
        copy_tensors(own, tensors, path)

    def with_saved(self, path: Path) -> AbstractContextManager[None]:
        """Temporarily replace the trained tensors by those of the file."""
        return values_restored(self, lambda: self._copy_in(self.pipe, path))

    def loading_code(self, path: Path) -> list[str]:
        """Return the code that calls `pipe.load_lora_weights`."""
        file = f"{str(path.parent)!r}, weight_name={path.name!r}"
        if "transformer_2" not in self.parts:
            return [f"pipe.load_lora_weights({file})"]
        return [f"pipe.{name}.load_lora_adapter({file}, prefix={name!r})" for name in self.parts]

    def _copy_in(self, pipe: Any, path: Path) -> None:
        from peft import set_peft_model_state_dict

        tensors, _ = read_tensors(path)
        for name in self.parts:
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            unknown = set_peft_model_state_dict(getattr(pipe, name), own, _ADAPTER).unexpected_keys
            if unknown:
                raise ValueError(f"{path} contains {unknown[0]}, but no such layer of {name} is adapted")
