"""Layers whose weights accelerate keeps elsewhere and loads for each of their forward passes.

Its hooks handle the tensors that a module had when they were installed: outside of the forward pass, these are on the
meta device, and their values are in the hook's `weights_map`. An adapter that is added later stays on the device where
the layer computes, hidden from the hook. The hooks are found by their attributes, without importing accelerate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_vision.names import is_adapter_name


class Offloaded(NamedTuple):
    """How one module is offloaded."""

    hook: Any  # the hook of accelerate
    prefix: str  # what comes before the names of the module's tensors in the hook

    @property
    def device(self) -> torch.device:
        """The device on which the module computes."""
        return torch.device(self.hook.execution_device or "cpu")

    def value(self, name: str) -> Tensor:
        """The value of a tensor of the module, wherever it is kept."""
        return self.hook.weights_map[self.prefix + name]


def offloaded_modules(root: nn.Module) -> dict[nn.Module, Offloaded]:
    """Every module in `root` whose tensors are offloaded between its forward passes."""
    found = {}
    for module in root.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False):
                inner = module.named_modules() if each.place_submodules else [("", module)]
                found.update({part: Offloaded(each, f"{path}." if path else "") for path, part in inner})
    return found


def hide_new_adapters(hook: Any) -> None:
    """Make a hook of accelerate ignore the adapters that it did not find when it was installed."""
    kind = type(hook)
    if not issubclass(kind, _Beside):
        hook.__class__ = _CLASSES.setdefault(
            kind, type(kind.__name__, (_Beside, kind), {"__module__": kind.__module__})
        )


_CLASSES: dict[type, type] = {}


class _Beside:
    """Mixin of a hook: adapters that are unknown to it are not registered on the module while it acts."""

    original_devices: dict[str, Any]
    place_submodules: bool

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._hidden(module):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with self._hidden(module):
            return super().post_forward(module, output)  # type: ignore[misc]

    def detach_hook(self, module: nn.Module) -> nn.Module:
        with self._hidden(module):
            return super().detach_hook(module)  # type: ignore[misc]

    @contextlib.contextmanager
    def _hidden(self, module: nn.Module) -> Iterator[None]:
        parts = module.named_modules() if self.place_submodules else [("", module)]
        taken = []
        for path, part in parts:
            for name in [name for name in part._parameters if is_adapter_name(name)]:
                if f"{path}.{name}".lstrip(".") not in self.original_devices:
                    taken.append((part, name, part._parameters.pop(name)))
        try:
            yield
        finally:
            for part, name, tensor in taken:
                part._parameters[name] = tensor
