"""PEFT's LoRA and VeRA together with a fully trained classifier, saved to one file."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from randlora_vision.errors import printable_errors
from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.integrations.timm import head_modules
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.methods.adaptation import copy_tensors, finite_gradients, quiet
from randlora_vision.training.methods.lora import check_rank, sides

_METADATA = "randlora_vision.peft"  # a single key: safetensors does not fix the order of several
_SETTINGS = {
    "peft_type": str,
    "r": int,
    "lora_alpha": float | None,
    "projection_prng_key": int | None,
    "modules_to_save": list[str] | None,
}
_LAYER = re.compile(r"base_model\.model\.(.+)\.(?:lora_A\.weight|vera_lambda_d)")  # has as many rows as the rank
_COPIES = ".modules_to_save"  # suffix of the modules that PEFT trains in full
# The tensors of PEFT that start at zero: one of every adapter.
_STARTS_AT_ZERO = re.compile(r"\.(lora_B|vera_lambda_b)\.")


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
        first = [(name, p.grad) for name, p in self.parameters() if _STARTS_AT_ZERO.search(name)]
        dead = [_STARTS_AT_ZERO.split(name)[0] for name, grad in first if grad is None]
        if dead:
            names = [name.removeprefix("base_model.model.") for name in dead]
            raise ValueError(
                f"no gradient reaches PEFT's adapters of {listing(names, 3)}: the model reads "
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

        tensors, metadata = read_tensors(path)
        theirs = check_type(parse_json(metadata.get(_METADATA, "{}"), path), dict, path, _METADATA)
        ours = self.model.peft_config["default"].to_dict()
        scales = _SETTINGS.keys() - {"modules_to_save"}  # what the meaning of the tensors depends on
        differing = sorted(key for key in scales if theirs.get(key) != ours.get(key))
        if differing:
            raise ValueError(f"{path} does not hold this PEFT adapter: {', '.join(differing)} differ")
        copy_tensors(get_peft_model_state_dict(self.model), tensors, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_peft`."""
        return [
            "from randlora_vision.training.methods.peft import load_peft",
            f"model = load_peft(model, {str(path)!r})",
        ]


def is_peft(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata of a file are those of `Peft.save`."""
    return _METADATA in metadata


@printable_errors
def load_peft(model: nn.Module, path: Path | str) -> Any:
    """Add the adapter in a file written by `Peft` to a base model, in place; return PEFT's wrapper of it.

    The adapted layers are those that the file has tensors of: the pattern in its settings is not run.

    Raises ValueError for any other file.
    """
    from peft import LoraConfig, VeraConfig, set_peft_model_state_dict

    tensors, metadata = read_tensors(Path(path))
    if not is_peft(metadata):
        raise ValueError(f"{path} is not a file of PEFT adapters written by this package")
    settings = check_object(parse_json(metadata[_METADATA], path), _SETTINGS, path)
    method = settings["peft_type"]
    if method not in ("LORA", "VERA"):
        raise ValueError(f"{path}: peft_type must be LORA or VERA, got {method!r}")
    layers = {match[1]: len(tensor) for name, tensor in tensors.items() if (match := _LAYER.fullmatch(name))}
    missing = sorted({*layers, *(settings["modules_to_save"] or ())} - {name for name, _ in model.named_modules()})
    if missing or not layers:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {len(missing)} of its layers are not in the model "
            f"({listing(missing, 3)})"
        )
    if set(layers.values()) != {settings["r"]}:
        raise ValueError(f"{path}: its tensors are not of rank {settings['r']}, which its settings name")
    shared = {
        "r": settings["r"],
        "target_modules": "|".join(re.escape(name) for name in layers),
        "modules_to_save": settings["modules_to_save"],
    }
    try:
        with quiet():
            if method == "LORA":
                config: Any = LoraConfig(lora_alpha=settings["lora_alpha"], **shared)
            else:
                key = settings["projection_prng_key"]
                config = VeraConfig(projection_prng_key=key, save_projection=False, **shared)
            wrapped = _wrap(model, config)
            loaded = set_peft_model_state_dict(wrapped, tensors)
    except (TypeError, RuntimeError) as error:  # of PEFT, for a tensor of another shape
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {error}") from None
    if loaded.unexpected_keys:
        raise ValueError(f"{path} has tensors that the model does not: {listing(loaded.unexpected_keys, 3)}")
    return wrapped.requires_grad_(False)


def _wrap(model: nn.Module, config: Any) -> Any:
    """Call PEFT, which adapts the model in place; Any, because PEFT may not be installed."""
    from peft import get_peft_model

    if config.peft_type.value == "LORA":
        layers: dict[str, Any] = dict(model.named_modules())
        adapted = {name: layer for name, layer in layers.items() if re.fullmatch(config.target_modules, name)}
        check_rank("LoRA", config.r, {name: sides(layer.weight) for name, layer in adapted.items()})
    with quiet():
        return get_peft_model(model, config)
