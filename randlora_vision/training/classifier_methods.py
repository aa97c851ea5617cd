"""The ways of training a timm classifier: RandLoRA, PEFT's LoRA and VeRA, all of it, or its head."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.files import replacing
from randlora_vision.integrations.timm import head_modules, load_adapter
from randlora_vision.training.classifier_options import ClassifierOptions
from randlora_vision.training.lora import rank_for_budget
from randlora_vision.training.methods import Adaptation, RandLoRA, TrainedTensors, finite_gradients, quiet

_METADATA = "randlora_vision.peft"  # one key: safetensors writes several in any order
_COPIES = ".modules_to_save"  # of the modules that PEFT trains in full
_PLAIN_CODE = (
    "from safetensors.torch import load_file",
    "model.load_state_dict(load_file({path!r}), strict=False)",
)
# Of the tensors that PEFT adds, those with a gradient at the first step: the others wait for these.
_FIRST_TO_LEARN = re.compile(r"\.(lora_B|vera_lambda_b)\.")


class RandLoRAWithHead(RandLoRA):
    """RandLoRA beside a classifier that is trained in full, in one file."""

    def check_gradients(self) -> list[str]:
        """Check both."""
        return super().check_gradients() + finite_gradients(head_parameters(self.model))

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the adapter file, head included."""
        load_adapter(model, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the integration's call."""
        return ["from randlora_vision.integrations.timm import load_adapter", f"load_adapter(model, {str(path)!r})"]


class Peft:
    """One of PEFT's methods beside a classifier that is trained in full, in one file."""

    def __init__(self, model: nn.Module, config: Any, targets: list[str]) -> None:
        heads = head_modules(model)
        modules = dict(model.named_modules())
        foreign = [name for name in targets if name not in modules]
        if foreign:
            raise ValueError(
                f"PEFT adapts layers and {foreign[0]} is a bare parameter: leave it out (--target-modules)"
            )
        self.model = _wrap(model, config)
        copies = (name for name, _ in model.named_modules())
        wrapped = [name.removesuffix(_COPIES) for name in copies if name.endswith(_COPIES)]
        if sorted(wrapped) != sorted(heads):
            raise ValueError(f"PEFT takes {', '.join(wrapped)} for the classifier, which is {', '.join(heads)}")
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        numbers = sum(p.numel() for _, p in self.trained)
        self.report = (
            f"PEFT's {config.peft_type.value} of rank {config.r} on {len(targets)} weights, "
            f"and {', '.join(heads)} in full: {numbers:,} numbers are trained"
        )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what PEFT left trainable, the head included."""
        yield from self.trained

    def check_gradients(self) -> list[str]:
        """Require a gradient on every adapter: PEFT wraps a layer, and a model that reads its weight passes it by."""
        first = [(name, p.grad) for name, p in self.parameters() if _FIRST_TO_LEARN.search(name)]
        dead = [_FIRST_TO_LEARN.split(name)[0] for name, grad in first if grad is None or not grad.any()]
        if dead:
            names = [name.removeprefix("base_model.model.") for name in dead]
            raise ValueError(
                f"no gradient reaches PEFT's adapters of {', '.join(names[:3])} ({len(dead)} in all): the model reads "
                "these weights without calling their layers; name others with --target-modules, or take --method "
                "randlora, which adapts them"
            )
        return finite_gradients(self.parameters())

    def save(self, path: Path) -> None:
        """Write what PEFT saves, and its configuration in the file's metadata."""
        from peft import get_peft_model_state_dict

        tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(self.model).items()}
        config = self.model.peft_config["default"].to_dict()
        with replacing(path) as temporary:
            save_file(tensors, temporary, {_METADATA: json.dumps(config, default=sorted)})

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the file."""
        load_peft(model, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_peft`."""
        return [
            "from randlora_vision.training.classifier_methods import load_peft",
            f"model = load_peft(model, {str(path)!r})",
        ]


def load_peft(model: nn.Module, path: Path | str) -> Any:
    """Put the adapter of a file that `Peft` wrote on a base model, in place; return PEFT's wrapper of it."""
    from peft import PeftConfig, set_peft_model_state_dict

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _METADATA not in metadata:
            raise ValueError(f"{path} is no file of PEFT's adapters by this package")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    with quiet():
        wrapped = _wrap(model, PeftConfig.from_peft_type(**json.loads(metadata[_METADATA])))
        set_peft_model_state_dict(wrapped, tensors)
    return wrapped.requires_grad_(False)


def head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a timm model's classifier."""
    for head in head_modules(model):
        for name, parameter in model.get_submodule(head).named_parameters():
            yield f"{head}.{name}", parameter


def resolve_budget(options: ClassifierOptions, model: nn.Module) -> ClassifierOptions:
    """Turn LoRA's budget, where there is one, into the rank that comes nearest to it."""
    adapter = options.adapter
    if adapter.budget is None:
        return options
    rank = rank_for_budget(model, _targets(model, options), adapter.budget)
    return replace(options, adapter=replace(adapter, rank=rank, alpha=adapter.alpha or 2.0 * rank, budget=None))


def adapt(model: nn.Module, options: ClassifierOptions) -> Adaptation:
    """Make the model trainable by the chosen method, everything else frozen."""
    adapter, seed = options.adapter, options.training.seed
    if adapter.method == "full":
        return TrainedTensors(model, [name for name, _ in model.named_parameters()], "full fine-tuning", _PLAIN_CODE)
    if adapter.method == "linear-probe":
        return TrainedTensors(model, [name for name, _ in head_parameters(model)], "linear classifier", _PLAIN_CODE)
    assert adapter.rank is not None, "resolve the options first"
    if adapter.method == "randlora":
        return RandLoRAWithHead(model, randlora_config(model, options, adapter.rank, adapter.alpha))
    from peft import LoraConfig, VeraConfig

    targets = _targets(model, options)
    shared = {
        "r": adapter.rank,
        "target_modules": "|".join(re.escape(name) for name in targets),
        "modules_to_save": head_modules(model),
    }
    if adapter.method == "lora":
        return Peft(model, LoraConfig(lora_alpha=adapter.alpha, **shared), targets)
    # The projections come from the seed, as RandLoRA's bases do: in the file they would be most of it.
    with quiet():
        config = VeraConfig(projection_prng_key=seed, save_projection=False, **shared)
    return Peft(model, config, targets)


def randlora_config(
    model: nn.Module, options: ClassifierOptions, rank: int, alpha: float | None = None
) -> RandLoRAConfig:
    """Return RandLoRA's configuration for these options: the backbone adapted, the head trained in full."""
    adapter = options.adapter
    named = adapter.target_modules[0] if len(adapter.target_modules) == 1 else adapter.target_modules
    return RandLoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=adapter.dropout,
        target_modules=named or "timm:backbone",
        bases=adapter.bases,
        init=adapter.init,
        seed=options.training.seed,
        modules_to_save=head_modules(model),
    )


def _targets(model: nn.Module, options: ClassifierOptions) -> list[str]:
    """Return the names of the weights that RandLoRA would adapt; rank 1 fits every weight."""
    return [target.name for target in plan(model, randlora_config(model, options, rank=1)).targets]


def _wrap(model: nn.Module, config: Any) -> Any:
    """Call PEFT, which adapts the model in place. Any: its classes are known where it is installed."""
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
