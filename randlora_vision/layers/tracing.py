"""Adapted layers under symbolic tracing by torch.fx, which torchvision's and timm's feature extraction uses.

A graph must not contain the numbers of the trace: it calls the layer, or reads the effective weight from it, whenever
it runs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

from randlora_vision.names import PARTS, parameter_name

_GETATTR = nn.Module.__getattr__


def traced_weight(module: nn.Module, param: str, adapter_name: str) -> Proxy | None:
    """While torch.fx traces: a proxy of the effective weight, read from the module by the graph; otherwise None."""
    if nn.Module.__getattr__ is _GETATTR:  # a tracer replaces it, so that it returns proxies of the parameters
        return None
    lam = getattr(module, parameter_name(param, PARTS[0], adapter_name))
    if not isinstance(lam, Proxy):
        return None
    read = lam.node
    if not read.users and "erased" not in read.meta:  # a graph with it would need the adapter for ever
        read.graph.erase_node(read)
        read.meta["erased"] = True  # the tracer returns the same proxy again
    owner = lam.tracer.create_proxy("get_attr", _path(lam, module), (), {})
    return getattr(owner, param)


def traced_call(module: nn.Module, input: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """A proxy of the module's output: the graph calls the module."""
    return input.tracer.create_proxy("call_module", _path(input, module), (input, *args), kwargs)


def _path(proxy: Proxy, module: nn.Module) -> str:
    path: str = proxy.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        raise RuntimeError(
            f"torch.fx cannot trace an adapted {type(module).__name__} on its own: trace a module that contains it"
        )
    return path
