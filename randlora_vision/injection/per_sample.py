"""A batch of several adapters: `per_sample` gives every sample its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from randlora_vision.injection.record import ModelRecord, check_names, own_record, records, unwrap
from randlora_vision.injection.trained_in_full import saved_by_module
from randlora_vision.layers.adapted import adapted_modules
from randlora_vision.layers.mixed import by_adapter, stacks_of
from randlora_vision.layers.state import Mixture
from randlora_vision.torch_internals import remove_hooks, set_call_hooks

BASE = "base"
_HOOK = -17  # PyTorch numbers its hooks from 0


@contextlib.contextmanager
def per_sample(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Give every sample of a batch its own adapter inside the block, whichever adapters are active.

    The result is that of one sample at a time, up to rounding. A linear layer multiplies all samples by the frozen
    weight and the shared bases at once; convolutions, packed attention and modules trained in full run once per
    adapter. The adapters may differ in rank, bases and targets; equal ones cost least.

    A layer must see the batch in its first dimension: (S, ...), or, as with windows, several rows per sample one after
    another. What cannot be recognised is refused, never guessed.

    Gradients reach the adapters that require them (`set_active` with all names makes them trainable): run the backward
    pass inside the block if activations are checkpointed. Compiled models can only be evaluated, and are not compiled
    again for other names, except where modules run once per adapter; for them, what an adapter is when the block is
    entered holds to its end. `disabled` inside the block has precedence.

    Args:
        model: The adapted model.
        names: One adapter per sample of the batch that the model itself gets (with classifier-free guidance, diffusers
            doubles it: ``names * 2``). None stands for the base, as does ``"base"`` unless an adapter has this name.

    Raises:
        ValueError: If the model has no such adapter, any adapter is merged, a layer in it has its batch in the second
            dimension, or a module that adapters train in full cannot be called once per adapter; from a call inside
            the block, if the batch size is not the number of names, or a layer's input does not show it.
        RuntimeError: From a call inside the block, if the model's code reads an adapted weight itself.
    """
    model = unwrap(model)
    chosen = _checked(model, names)
    roots = [(root, record) for _, root, record in records(model)]
    with contextlib.ExitStack() as undo:
        for root, record in roots:
            undo.callback(_restore, root, record, record.switches.mixture)
            mixture = Mixture(chosen, {id(module): path for path, module in root.named_modules()})
            for module, tensors in saved_by_module(root, record, mixture.distinct):
                undo.enter_context(_once_per_adapter(module, record, mixture, tensors))
            record.switches.mixture = mixture
            set_call_hooks(root, _HOOK, _before_call, _after_call)
            for _, module, param, state in adapted_modules(root):
                undo.callback(setattr, state, "stacks", state.stacks)
                stacks_of(module, param, mixture)
        yield


def _restore(root: nn.Module, record: ModelRecord, mixture: Mixture | None) -> None:
    record.switches.mixture = mixture
    if mixture is None:
        remove_hooks(root, _before_call, _after_call)


def _checked(model: nn.Module, names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The adapter of every sample, with None for the base."""
    if isinstance(names, str) or not names or not all(name is None or isinstance(name, str) for name in names):
        raise ValueError(f"names must be a list with one adapter name (or None) per sample, got {names!r}")
    known = check_names(model, None)
    chosen = tuple(None if name == BASE and BASE not in known else name for name in names)
    check_names(model, [name for name in chosen if name is not None])
    for _, root, record in records(model):
        if record.switches.merged:
            merged = ", ".join(record.switches.merged)
            raise ValueError(f"{merged} merged into the weights, which all samples share: call unmerge first")
        for path, module in root.named_modules():
            if getattr(module, "batch_first", True) is False:
                raise ValueError(
                    f"per_sample: {path!r} has batch_first=False, and layers around it may have the batch in their "
                    "second dimension: run the samples of each adapter separately (randlora_vision.set_active)"
                )
    return chosen


def _before_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mixture = _mixture(model)
    if mixture is None:
        return
    for value in (*args, *kwargs.values()):
        if (isinstance(value, Tensor) and value.ndim) or (isinstance(value, (list, tuple)) and value):
            if len(value) != mixture.samples:
                raise ValueError(
                    f"per_sample: the model got a batch of {len(value)} for {mixture.samples} adapter names: give "
                    "one name for each sample (with classifier-free guidance, diffusers doubles the batch: names * 2)"
                )
            mixture.in_model = True
            return


def _after_call(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    mixture = _mixture(model)
    if mixture is not None:
        mixture.in_model = False


def _mixture(model: nn.Module) -> Mixture | None:
    record = own_record(model)
    return None if record is None else record.switches.mixture


@contextlib.contextmanager
def _once_per_adapter(
    module: nn.Module, record: ModelRecord, mixture: Mixture, tensors: dict[str | None, dict[str, Tensor]]
) -> Iterator[None]:
    """Call a module with each adapter's own tensors on its samples."""
    inner, replaced = module.forward, module.__dict__.get("forward")

    def select(name: str | None) -> Callable[[], None]:
        tables: list[Any] = [module._parameters, module._buffers]
        places = [(table, key) for key in tensors[name] for table in tables if key in table]
        old = [table[key] for table, key in places]

        def undo() -> None:
            for (table, key), tensor in zip(places, old, strict=True):
                table[key] = tensor

        for table, key in places:
            table[key] = tensors[name][key]
        return undo

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if record.switches.mixture is not mixture or not record.switches.enabled:  # within an inner block
            return inner(*args, **kwargs)
        return by_adapter(module, mixture, inner, args, kwargs, select)

    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if replaced is not None:
            module.forward = replaced
