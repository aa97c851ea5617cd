"""Every use of PyTorch's private API, in one place; each is tested separately.

An update of torch that changes one of these fails in `tests/test_torch_internals.py` first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def storage_key(tensor: Tensor) -> int:
    """An identifier that all views of one live storage share; ``data_ptr`` is 0 for tensors without memory."""
    return tensor.untyped_storage()._cdata


def version(tensor: Tensor) -> int:
    """The version counter, which every in-place change of a tensor increments."""
    return tensor._version


def saved_tensor_hooks_are_free() -> bool:
    """False if other saved-tensor hooks are active, and where torch does not allow hooks (torch.func)."""
    autograd = torch._C._autograd
    forbidden = autograd._saved_tensors_hooks_get_disabled_error_message()
    return forbidden is None and autograd._top_saved_tensors_default_hooks(True) is None


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """True inside the transforms of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""True inside the transforms of torch.func, such as vmap."""
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
"""True while torch.jit traces; sizes are tensors then."""
is_autocast_on: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""True within autocast for any type of device."""
is_proxied: Callable[[], Any] = functools.partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)
"""The mode in which make_fx and torch.export record a graph, or None."""


def writes_are_private() -> bool:
    """True if nothing records or transforms operations, so that their results may be written into new tensors."""
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or transforms_are_active() or is_jit_tracing():
        return False
    # A graph of torch.export or make_fx may run with gradients later.
    return not torch_exports() and is_proxied() is None


unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default
"""A contiguous tensor in another shape, as the output of F.linear is: autograd does not treat it as a view.

Autograd forbids writes into a view from a Function, and FSDP 2 warns of modules that return views.
"""
eager_unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default._op
"""The same without a call in Python; torch.compile does not know it."""


def fake_mode_of(tensor: Tensor) -> Any:
    """The mode of a fake tensor whose products need fake tensors too; None for other tensors and in torch.export."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    mode = getattr(tensor, "fake_mode", None)
    return None if mode is None or mode.allow_non_fake_inputs else mode


def assumed_constant(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``, which imports the compiler, a matter of seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


torch_exports: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""True while torch.export traces."""


def is_exporting() -> bool:
    """True while torch.jit or torch.export traces, whose graphs are used at other sizes and hold operators alone.

    PyTorch 2.6 cannot tell for torch.export.
    """
    return torch_exports() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def persistent_names(module: nn.Module) -> list[str]:
    """Names of the module's own parameters and of the buffers that its state dict holds."""
    buffers = (name for name in module._buffers.keys() if name not in module._non_persistent_buffers_set)
    return [*module._parameters.keys(), *buffers]  # TorchScript's are not iterable


def remove_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Remove hooks of calls and of ``load_state_dict`` from a module."""
    tables: tuple[dict[int, Any], ...] = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    options = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for registered in tables:
        for key, hook in list(registered.items()):
            if getattr(hook, "hook", hook) in hooks:
                for table in (registered, *options):
                    table.pop(key, None)


def set_call_hooks(module: nn.Module, key: int, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Register hooks of calls under a fixed key, so that compiled code does not depend on when that was."""
    module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key] = before, True
    module._forward_hooks[key], module._forward_hooks_always_called[key] = after, True


def makes_empty(fn: Callable[[Tensor], Tensor]) -> bool:
    """True for the function that ``nn.Module.to_empty`` applies: its results have no values."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")


def is_fsdp_managed(module: nn.Module) -> bool:
    """True for a module whose parameters FSDP, of either version, shards and gathers."""
    return getattr(module, "_is_fsdp_managed_module", False)
