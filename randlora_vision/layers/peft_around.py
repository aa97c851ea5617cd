"""Support for PEFT layers that wrap adapted layers, and for hosts that copy weights into layers of their own.

PEFT's LoRA, which diffusers' ``load_lora_weights`` injects, renames ``to_q`` to ``to_q.base_layer``. Targets keep
their plain names, whether they were wrapped before or after.

A PEFT layer writes its merges to ``base_layer.weight.data``. The effective weight is a temporary tensor, in which the
write would be lost. A property cannot know what its reader does next, so the methods of PEFT that write weights are
wrapped: while one of them runs on a layer around an adapted one, the attribute is the base's Parameter, and both
adapters apply. DoRA's norms are taken of the base as well, since its magnitudes are made for the base. All other reads,
such as OFT's, whose forward does not call the wrapped layer, give the effective weight.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from randlora_vision.layers.adapted import AdaptedModule

_BASE_READERS = (
    # Some initialisations write too: PiSSA, OLoRA.
    ("peft.tuners.tuners_utils", "BaseTunerLayer", ("merge", "unmerge", "update_layer")),
    ("peft.tuners.lora.dora", "DoraLinearLayer", ("forward",)),
)
"""Module, class and methods that must get the base's Parameter; for all subclasses too."""
_FUSED = re.compile("to_(added_)?q?kv")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def watch_hosts() -> None:
    """Wrap these methods in all classes of PEFT, the present ones and later ones."""
    _listen()
    for module, name, methods in _BASE_READERS:
        found = getattr(sys.modules.get(module), name, None)
        if found is not None:
            _wrap(found, methods)


@functools.cache
def _listen() -> None:
    register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, AdaptedModule) or type(child).__module__.startswith("peft."):
        watch_hosts()
    elif _FUSED.fullmatch(name) and any(_adapted_in(parent._modules.get(part)) for part in _PROJECTIONS):
        raise RuntimeError(
            "fuse_qkv_projections copies adapted weights into new layers, where the adapters can be neither trained "
            "nor removed: fuse before adding the adapters, or merge and remove them first"
        )


def _wrap(owner: Any, methods: tuple[str, ...]) -> None:
    for name in methods:
        method = vars(owner).get(name)
        if callable(method) and not hasattr(method, "_randlora_wrapped"):
            setattr(owner, name, _on_the_base(method))
    for subclass in owner.__subclasses__():
        _wrap(subclass, methods)


def _on_the_base(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        found = [part for module in given for part in _adapted_in(module) if not part._randlora_on_base]
        merged = [
            (state, module.base_weight(param), module.base_weight(param).detach().clone())
            for module in found
            for param, state in module._randlora.items()
            if state.merged and not state.written and method.__name__ != "forward"
        ]
        for module in found:
            module._randlora_on_base = True
        try:
            return method(*args, **kwargs)
        finally:
            for module in found:
                del module._randlora_on_base
            for state, weight, before in merged:
                state.written = not torch.equal(weight, before)

    run._randlora_wrapped = True  # type: ignore[attr-defined]
    return run


def _adapted_in(module: nn.Module | None) -> list[AdaptedModule]:
    return [] if module is None else [part for part in module.modules() if isinstance(part, AdaptedModule)]


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""The only child of a wrapper: of FSDP 1, of checkpointed activations and of `torch.compile`."""


def inside(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of PyTorch."""
    while True:
        inner = next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)
        if inner is None:
            return model
        model = inner


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) as `named_modules(remove_duplicate=False)`, without wrappers, PEFT's layers and parts."""
    tuner_layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    model = inside(model)
    while tuner_layer is not None and isinstance(model, tuner_layer) and hasattr(model, "base_layer"):
        model = inside(model.base_layer)
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{path}.{name}" if path else name)


def plain_name(path: str) -> str:
    """The path that a parameter has without wrappers."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", *_WRAPPERS))
