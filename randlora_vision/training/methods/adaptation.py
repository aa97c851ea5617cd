"""The four ways of training a model, behind one small interface: what is trained, saved and loaded."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    check_gradients,
    inject,
    load_adapter,
    plan,
    remove,
    save_adapter,
    suggest_lr,
)
from randlora_vision.adapters.refill import refill
from randlora_vision.files import adapter_file
from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.names import listing
from randlora_vision.training.harness.options import AdapterOptions


class Adaptation(Protocol):
    """A model made trainable by one method."""

    report: str  # for people: what is trained

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters by name."""

    def check_gradients(self) -> list[str]:
        """Check after the first backward pass: raise ValueError for a part that cannot learn, else return notes."""

    def save(self, path: Path) -> None:
        """Write the trained parameters, and nothing else, atomically."""

    def load(self, model: nn.Module, path: Path) -> None:
        """Load a saved file into a fresh base model."""

    def start_from(self, path: Path) -> None:
        """Copy a saved file into the trained parameters; raise ValueError unless it holds exactly these."""

    def loading_code(self, path: Path) -> list[str]:
        """Return the lines of Python that do the same for a model in the variable `model`."""


def randlora_config(
    adapter: AdapterOptions, seed: int, preset: str, modules_to_save: Iterable[str] = ()
) -> RandLoRAConfig:
    """Return the configuration of RandLoRA for a script's options; `preset` is adapted if they name no target.

    Without a rank, which the defaults fill in, it is 1: the targets do not depend on it.
    """
    named = adapter.target_modules[0] if len(adapter.target_modules) == 1 else adapter.target_modules
    return RandLoRAConfig(
        rank=adapter.rank or 1,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=named or preset,
        exclude_modules=adapter.exclude_modules,
        bases=adapter.bases,
        init=adapter.init,
        seed=seed,
        modules_to_save=tuple(modules_to_save),
    )


SAMPLES = 16
"""The number of validation images on whose features the suggested rate is measured."""


def suggested_lr(model: nn.Module, config: RandLoRAConfig, features: Callable[[], Tensor | Sequence[Tensor]]) -> float:
    """Return the `suggest_lr` of adapters that the model does not have yet; it is left as it was.

    Where the features give none (equal samples, or adapters behind the features), it is that of the weights, and a
    line says so. Two digits: a resumed run gets the same rate on a machine that rounds otherwise. Every process gets
    the rate of the first one.
    """
    with quiet():
        inject(model, config)
    try:
        try:
            lr = suggest_lr(model, features=features)
        except ValueError as error:
            lr = suggest_lr(model)
            PartialState().print(f"note: --lr auto goes by the weights alone, {lr:.1e}: {error}")
    finally:
        remove(model)
    return broadcast_object_list([float(f"{lr:.1e}")])[0]


def target_names(model: nn.Module, config: RandLoRAConfig) -> list[str]:
    """Return the names of the weights that RandLoRA would adapt, whatever the rank."""
    return [target.name for target in plan(model, replace(config, rank=1, alpha=None)).targets]


class RandLoRA:
    """RandLoRA: random bases with trained diagonal factors, as implemented by this package."""

    def __init__(self, model: nn.Module, config: RandLoRAConfig) -> None:
        self.model = model
        with quiet():
            self.report = str(inject(model, config))
        adapters = {id(parameter) for _, parameter in adapter_parameters(model)}
        self.whole = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield lambda and gamma of every adapted weight, then the parameters that are trained in full."""
        yield from adapter_parameters(self.model)
        yield from ((name, self.model.get_parameter(name)) for name in self.whole)

    def check_gradients(self) -> list[str]:
        """Call the library's check, which knows which of the two factors has no gradient at first."""
        return check_gradients(self.model)

    def save(self, path: Path) -> None:
        """Write the adapter file."""
        save_adapter(self.model, path)

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the adapter file."""
        with quiet():
            load_adapter(model, path)

    def start_from(self, path: Path) -> None:
        """Copy the values of an adapter file."""
        refill(self.model, adapter_file.read(path), path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_adapter`."""
        return ["from randlora_vision import load_adapter", f"load_adapter(model, {str(path)!r})"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress user warnings that the printed report or an error already covers."""
    with warnings.catch_warnings():  # which takes a filter only from Python 3.11 on
        warnings.simplefilter("ignore", UserWarning)
        yield


class TrainedTensors:
    """Trains parameters of the model itself: a whole tower (full fine-tuning) or a classifier (linear probe)."""

    def __init__(self, model: nn.Module, names: Iterable[str], what: str, code: Sequence[str]) -> None:
        self.model = model
        self.code = code  # lines in which {path!r} is replaced by the file
        model.requires_grad_(False)
        self.names = list(unfrozen(model, names))
        self.report = f"{what}: {len(self.names)} parameters of the model itself"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name."""
        for name in self.names:
            yield name, self.model.get_parameter(name)

    def check_gradients(self) -> list[str]:
        """Require finite gradients; return a note on the parameters that the loss does not depend on."""
        return finite_gradients(self.parameters())

    def save(self, path: Path) -> None:
        """Write the parameters under their names in the model."""
        with replacing(path) as temporary:
            save_file({name: p.detach().contiguous() for name, p in self.parameters()}, temporary)

    def start_from(self, path: Path) -> None:
        """Copy the parameters in the file."""
        copy_tensors(dict(self.parameters()), read_tensors(path)[0], path)

    def load(self, model: nn.Module, path: Path) -> None:
        """Copy the parameters in the file into the model."""
        tensors, _ = read_tensors(path)
        move(model, tensors, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return plain safetensors and PyTorch calls."""
        return [line.format(path=str(path)) for line in self.code]


def unfrozen(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the named parameters of a model, which are trained from now on."""
    found = {name: model.get_parameter(name) for name in names}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def start(adaptation: Adaptation, options: AdapterOptions, resuming: bool) -> None:
    """Start from the file of `--init-adapter`, if any, unless resuming; raise ValueError if it does not fit."""
    if options.init_adapter is None or resuming:
        return
    path = Path(options.init_adapter)
    if not path.is_file():
        raise ValueError(f"--init-adapter: there is no file {path}")
    try:
        adaptation.start_from(path)
    except ValueError as error:
        raise ValueError(
            f"--init-adapter: {error}; it needs a file that this script wrote with the same --method, --rank, --alpha, "
            "--bases, --seed and targets"
        ) from error


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors`, which were read from `path`, into those of the same names; raise ValueError if they differ."""
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in held.items()} for held in (own, tensors))
    wrong = sorted(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path} does not hold what is trained here: {listing(wrong, 3)} {'is' if len(wrong) == 1 else 'are'} "
            "missing on one side, or of another shape"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def move(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, scale: float = 1.0) -> None:
    """Set the parameters named in `tensors` to base + scale * (tensor - base); raise ValueError if they do not fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path} is not an adapter of this model: {type(model).__name__} has no parameter {name}")
        if parameters[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file and {tuple(parameters[name].shape)} in the model"
            raise ValueError(f"{path} is not an adapter of this model: {name} is {shapes}")
    for name, tensor in tensors.items():
        own = parameters[name]
        own.copy_(torch.lerp(own, tensor.to(own), scale))


@contextlib.contextmanager
def values_restored(adaptation: Adaptation, change: Callable[[], None]) -> Iterator[None]:
    """Call `change`; on leaving the context, restore the previous values of the trained parameters."""
    before = [(parameter, parameter.detach().clone()) for _, parameter in adaptation.parameters()]
    try:
        change()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Raise ValueError for a gradient that is not finite; return a note on the parameters without one."""
    gradients = [(name, parameter.grad) for name, parameter in parameters]
    broken = [name for name, grad in gradients if grad is not None and not grad.isfinite().all()]
    if broken:
        raise ValueError(f"after the first backward pass, the gradient of {listing(broken, 3)} is not finite")
    without = [name for name, grad in gradients if grad is None]
    if len(without) == len(gradients):
        raise ValueError("after the first backward pass, no trained parameter has a gradient")
    return [f"no gradient reaches {listing(without, 3)}: they stay unchanged"] if without else []
