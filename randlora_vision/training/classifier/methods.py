"""The methods of training a timm classifier: RandLoRA, LoRA and VeRA of PEFT, full fine-tuning, or the head alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from randlora_vision import RandLoRAConfig
from randlora_vision.integrations.timm import head_modules, load_adapter
from randlora_vision.training.classifier.options import ClassifierOptions, ClassifierSettings
from randlora_vision.training.harness.optim import Rate, layer_rates, timm_layers
from randlora_vision.training.methods.adaptation import (
    Adaptation,
    RandLoRA,
    TrainedTensors,
    finite_gradients,
    quiet,
    randlora_config,
    target_names,
)
from randlora_vision.training.methods.peft import Peft

_PLAIN_CODE = (
    "from safetensors.torch import load_file",
    "model.load_state_dict(load_file({path!r}), strict=False)",
)


class RandLoRAWithHead(RandLoRA):
    """RandLoRA together with a fully trained classifier head, saved in one file."""

    def check_gradients(self) -> list[str]:
        """Check the gradients of the adapters and of the head."""
        return super().check_gradients() + finite_gradients(head_parameters(self.model))

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the adapter file, including the head."""
        load_adapter(model, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the code that calls `load_adapter` of the timm integration."""
        return ["from randlora_vision.integrations.timm import load_adapter", f"load_adapter(model, {str(path)!r})"]


def head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the classifier head of a timm model."""
    for head in head_modules(model):
        for name, parameter in model.get_submodule(head).named_parameters():
            yield f"{head}.{name}", parameter


def adapt(model: nn.Module, settings: ClassifierSettings) -> Adaptation:
    """Prepare the model for the chosen method and freeze all other weights."""
    adapter = settings.adapter
    if adapter.method == "full":
        return TrainedTensors(model, [name for name, _ in model.named_parameters()], "full fine-tuning", _PLAIN_CODE)
    if adapter.method == "linear-probe":
        return TrainedTensors(model, [name for name, _ in head_parameters(model)], "linear classifier", _PLAIN_CODE)
    if adapter.method == "randlora":
        return RandLoRAWithHead(model, config_of(model, settings))
    from peft import LoraConfig, VeraConfig

    targets = adapter_targets(model, settings)
    shared = {
        "r": adapter.rank,
        "target_modules": "|".join(re.escape(name) for name in targets),
        "modules_to_save": head_modules(model),
    }
    if adapter.method == "lora":
        return Peft(model, LoraConfig(lora_alpha=adapter.alpha, **shared), targets)
    # The projections come from the seed, like the bases of RandLoRA: saved, they would dominate the file size.
    with quiet():
        config = VeraConfig(projection_prng_key=settings.training.seed, save_projection=False, **shared)
    return Peft(model, config, targets)


def adapter_targets(model: nn.Module, options: ClassifierOptions) -> list[str]:
    """Return the names of the weights that an adapter changes."""
    return target_names(model, config_of(model, options))


def config_of(model: nn.Module, options: ClassifierOptions) -> RandLoRAConfig:
    """Return the RandLoRA configuration for a model."""
    return randlora_config(options.adapter, options.training.seed, "timm:backbone", head_modules(model))


def own_rates(model: nn.Module, settings: ClassifierSettings) -> dict[nn.Parameter, float]:
    """Return the learning rates that differ from the default, by parameter."""
    decay, head_lr = settings.rates.layer_decay, settings.adapter.head_lr
    rates = layer_rates(model, [timm_layers(model)], settings.training.lr, decay) if decay != 1 else {}
    if head_lr is not None:
        rates |= {p: Rate(head_lr, "head") for _, p in head_parameters(model) if p.requires_grad}
    return rates
