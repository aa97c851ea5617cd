"""The four ways of training a model, behind one small interface: what is trained, saved and loaded."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    check_gradients,
    inject,
    load_adapter,
    plan,
    save_adapter,
)
from randlora_vision.files.atomic import replacing
from randlora_vision.names import listing


class Adaptation(Protocol):
    """A model made trainable by one method."""

    report: str  # for people: what is trained

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters by name."""

    def check_gradients(self) -> list[str]:
        """After the first backward: raise ValueError for a trained part that cannot learn; return notes."""

    def save(self, path: Path) -> None:
        """Write what was trained, and nothing else, in one piece."""

    def load(self, model: nn.Module, path: Path) -> None:
        """Put a saved file on a fresh base model."""

    def loading_code(self, path: Path) -> list[str]:
        """Return the lines of Python that do the same, for a reader whose model is called `model`."""


class AdapterSettings(Protocol):
    """What the options of every script say of an adapter."""

    @property
    def rank(self) -> int | None:
        """R; None where a budget decides."""

    @property
    def alpha(self) -> float | None:
        """None for RandLoRA's own."""

    @property
    def dropout(self) -> float:
        """On the adapter's input."""

    @property
    def bases(self) -> str:
        """The distribution of the random bases."""

    @property
    def init(self) -> str:
        """Which factor starts at zero."""

    @property
    def target_modules(self) -> tuple[str, ...]:
        """One preset or regular expression, or several name suffixes; empty for the script's own preset."""


def randlora_config(
    adapter: AdapterSettings, seed: int, preset: str, modules_to_save: Iterable[str] = ()
) -> RandLoRAConfig:
    """RandLoRA's configuration for a script's options.

    Args:
        adapter: The options. A rank that a budget decides counts as 1, which fits every weight.
        seed: Of the random bases.
        preset: What is adapted where the options name nothing.
        modules_to_save: What is trained in full beside the adapters.
    """
    named = adapter.target_modules[0] if len(adapter.target_modules) == 1 else adapter.target_modules
    return RandLoRAConfig(
        rank=adapter.rank or 1,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=named or preset,
        bases=adapter.bases,
        init=adapter.init,
        seed=seed,
        modules_to_save=tuple(modules_to_save),
    )


def target_names(model: nn.Module, config: RandLoRAConfig) -> list[str]:
    """The weights that RandLoRA would adapt, whatever the rank."""
    return [target.name for target in plan(model, replace(config, rank=1, alpha=None)).targets]


class RandLoRA:
    """Random bases, trained diagonals: this package."""

    def __init__(self, model: nn.Module, config: RandLoRAConfig) -> None:
        self.model = model
        with quiet():
            self.report = str(inject(model, config))
        adapters = {id(parameter) for _, parameter in adapter_parameters(model)}
        self.whole = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield lambda and gamma of every adapted weight, and what is trained in full beside them."""
        yield from adapter_parameters(self.model)
        yield from ((name, self.model.get_parameter(name)) for name in self.whole)

    def check_gradients(self) -> list[str]:
        """Leave it to the library, which knows which of the two factors starts without a gradient."""
        return check_gradients(self.model)

    def save(self, path: Path) -> None:
        """Write the adapter file."""
        save_adapter(self.model, path)

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the adapter file."""
        with quiet():
            load_adapter(model, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the library's own call."""
        return ["from randlora_vision import load_adapter", f"load_adapter(model, {str(path)!r})"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings for which the user has other words: the printed report, or an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class TrainedTensors:
    """Parameters of the model itself: all of a tower's (full fine-tuning), or a classifier (linear probe)."""

    def __init__(self, model: nn.Module, names: Iterable[str], what: str, code: Sequence[str]) -> None:
        self.model = model
        self.names = list(names)
        self.code = code  # lines in which {path!r} stands for the file
        model.requires_grad_(False)
        for name in self.names:
            model.get_parameter(name).requires_grad_(True)
        self.report = f"{what}: {len(self.names)} parameters of the model itself"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name."""
        for name in self.names:
            yield name, self.model.get_parameter(name)

    def check_gradients(self) -> list[str]:
        """Require finite gradients; name the parameters that the loss does not depend on."""
        return finite_gradients(self.parameters())

    def save(self, path: Path) -> None:
        """Write the parameters under their own names."""
        with replacing(path) as temporary:
            save_file({name: p.detach().contiguous() for name, p in self.parameters()}, temporary)

    def load(self, model: nn.Module, path: Path) -> None:
        """Copy the parameters of the file into the model's."""
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                model.get_parameter(name).copy_(tensor)

    def loading_code(self, path: Path) -> list[str]:
        """Return the plain calls of safetensors and PyTorch."""
        return [line.format(path=str(path)) for line in self.code]


@contextlib.contextmanager
def values_restored(adaptation: Adaptation, change: Callable[[], None]) -> Iterator[None]:
    """Call `change`; on leaving the context give the trained parameters the values that they had before it."""
    before = [(parameter, parameter.detach().clone()) for _, parameter in adaptation.parameters()]
    try:
        change()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Raise ValueError for a gradient that is not finite; return a note on the parameters that have none."""
    gradients = [(name, parameter.grad) for name, parameter in parameters]
    broken = [name for name, grad in gradients if grad is not None and not grad.isfinite().all()]
    if broken:
        raise ValueError(f"after the first backward the gradient of {listing(broken, 3)} is not finite")
    without = [name for name, grad in gradients if grad is None]
    if len(without) == len(gradients):
        raise ValueError("after the first backward no trained parameter has a gradient")
    return [f"no gradient reaches {listing(without, 3)}: left as they are"] if without else []
