"""PEFT's LoRA and VeRA together with a fully trained classifier, saved to one file."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_vision.files.atomic import replacing
from randlora_vision.integrations.timm import head_modules
from randlora_vision.training.methods.adaptation import copy_tensors, finite_gradients, quiet

_METADATA = "randlora_vision.peft"  # a single key: safetensors does not fix the order of several
_SCALES = ("peft_type", "r", "lora_alpha", "projection_prng_key")  # what the meaning of the tensors depends on
_COPIES = ".modules_to_save"  # suffix of the modules that PEFT trains in full
# The tensors of PEFT with a nonzero gradient at the first step; the others follow once these have changed.
_FIRST_TO_LEARN = re.compile(r"\.(lora_B|vera_lambda_b)\.")


class Peft:
    """A PEFT method together with a fully trained classifier, saved to one file."""

    def __init__(self, model: nn.Module, config: Any, targets: list[str]) -> None:
        heads = head_modules(model)
        modules = dict(model.named_modules())
        foreign = [name for name in targets if name not in modules]
        if foreign:
            raise ValueError(
                f"PEFT adapts layers, but {foreign[0]} is a bare parameter: leave it out (--target-modules)"
            )
        self.model = _wrap(model, config)
        copies = (name for name, _ in model.named_modules())
        wrapped = [name.removesuffix(_COPIES) for name in copies if name.endswith(_COPIES)]
        if sorted(wrapped) != sorted(heads):
            raise ValueError(
                f"PEFT would train {', '.join(wrapped)} as the classifier, but the classifier is {', '.join(heads)}"
            )
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        numbers = sum(p.numel() for _, p in self.trained)
        self.report = (
            f"PEFT's {config.peft_type.value} of rank {config.r} on {len(targets)} weights, "
            f"and {', '.join(heads)} in full: {numbers:,} numbers are trained"
        )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter that PEFT leaves trainable, including the head."""
        yield from self.trained

    def check_gradients(self) -> list[str]:
        """Require a gradient on every adapter: a model that reads a wrapped layer's weight bypasses PEFT."""
        first = [(name, p.grad) for name, p in self.parameters() if _FIRST_TO_LEARN.search(name)]
        dead = [_FIRST_TO_LEARN.split(name)[0] for name, grad in first if grad is None or not grad.any()]
        if dead:
            names = [name.removeprefix("base_model.model.") for name in dead]
            raise ValueError(
                f"no gradient reaches PEFT's adapters of {', '.join(names[:3])} ({len(dead)} in all): the model reads "
                "these weights without calling their layers; choose others with --target-modules, or use --method "
                "randlora, which adapts them"
            )
        return finite_gradients(self.parameters())

    def save(self, path: Path) -> None:
        """Write the tensors that PEFT saves, with its configuration in the metadata."""
        from peft import get_peft_model_state_dict

        tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(self.model).items()}
        config = self.model.peft_config["default"].to_dict()
        with replacing(path) as temporary:
            save_file(tensors, temporary, {_METADATA: json.dumps(config, default=sorted)})

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the file."""
        load_peft(model, path)

    def start_from(self, path: Path) -> None:
        """Copy the tensors of a file with the same settings."""
        from peft import get_peft_model_state_dict

        with safe_open(path, framework="pt") as file:
            theirs = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        ours = self.model.peft_config["default"].to_dict()
        differing = [key for key in _SCALES if theirs.get(key) != ours.get(key)]
        if differing:
            raise ValueError(f"{path} does not hold this PEFT adapter: {', '.join(differing)} differ")
        copy_tensors(get_peft_model_state_dict(self.model), load_file(path), path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_peft`."""
        return [
            "from randlora_vision.training.methods.peft import load_peft",
            f"model = load_peft(model, {str(path)!r})",
        ]


def load_peft(model: nn.Module, path: Path | str) -> Any:
    """Add the adapter in a file written by `Peft` to a base model, in place; return PEFT's wrapper of it."""
    from peft import PeftConfig, set_peft_model_state_dict

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _METADATA not in metadata:
            raise ValueError(f"{path} is not a file of PEFT adapters written by this package")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    with quiet():
        wrapped = _wrap(model, PeftConfig.from_peft_type(**json.loads(metadata[_METADATA])))
        set_peft_model_state_dict(wrapped, tensors)
    return wrapped.requires_grad_(False)


def _wrap(model: nn.Module, config: Any) -> Any:
    """Call PEFT, which adapts the model in place; Any, because PEFT may not be installed."""
    from peft import get_peft_model

    narrow: Mapping[str, int] = {
        name: min(module.weight.shape[0], module.weight[0].numel())
        for name, module in model.named_modules()
        if config.peft_type.value == "LORA" and re.fullmatch(config.target_modules, name)
    }
    above = [name for name, side in narrow.items() if config.r > side]
    if above:
        raise ValueError(f"LoRA rank {config.r} is above the smaller side of {above[0]}, {narrow[above[0]]}")
    with quiet():
        return get_peft_model(model, config)
