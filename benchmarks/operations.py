"""What an adapted layer adds to a training step besides FLOPs: device operations, and calls in Python.

python -m benchmarks.operations

An operation is everything that the dispatcher runs on the device: no view, no allocation. On a GPU each is at least
one kernel launch, and small layers are bound by them. The sums of gradients that meet in one tensor are counted
separately.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import command_line
from benchmarks.methods import METHODS, Apply
from benchmarks.report import table
from benchmarks.workloads import Layer

_FREE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}
"""Operations without work on the device that are not views by their schema."""
SHAPES = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}
"""Inputs and outputs of the linear layers of a block of ViT-S."""


class Operations(TorchDispatchMode):
    """Counts operations within the block by name, and the sums of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.accumulations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "add" and _engine_calls():
            self.accumulations += 1
        elif not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _engine_calls() -> bool:
    """True within the sums of gradients; the backward pass of the compared layers adds only in Python."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in ("backward", "_engine_run_backward"):
        frame = frame.f_back  # the backward pass of a Function is closer than the engine
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@dataclass(frozen=True)
class Added:
    """What an adapted layer adds."""

    operations: Counter[str]
    accumulations: int
    calls: int
    """Calls of Python functions in one forward pass of the layer."""

    @property
    def count(self) -> int:
        """The number of added operations."""
        return self.operations.total()


def added(apply: Apply, inputs: int, outputs: int, images: int = 1, tokens: int = 197, rank: int = 32) -> Added:
    """Count what an adapter adds to forward and backward of a frozen linear layer whose input needs a gradient."""
    plain, sums, _ = _measured(Layer(inputs, outputs).requires_grad_(False), images, tokens)
    adapted = apply(Layer(inputs, outputs).requires_grad_(False), ["layer"], rank)
    counts, accumulations, calls = _measured(adapted, images, tokens)
    counts.subtract(plain)
    return Added(+counts, accumulations - sums, calls)


def _measured(model: nn.Module, images: int, tokens: int) -> tuple[Counter[str], int, int]:
    layer = model.get_submodule("layer" if hasattr(model, "layer") else "base_model.model.layer")
    x = torch.randn(images, tokens, layer.in_features, requires_grad=True)  # type: ignore[call-overload]
    layer(x).sum().backward()  # what is made once
    model.zero_grad(set_to_none=True)
    x.grad = None
    with Operations() as operations:
        out = layer(x)
        out.backward(torch.ones_like(out))
    return operations.counts, operations.accumulations, python_calls(lambda: layer(x))


def python_calls(function: Callable[[], object]) -> int:
    """Count the calls of Python functions, without that of `function` itself."""
    calls = -1

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    """Print the counts of every adapter for the layers of a ViT block."""
    parser = command_line.parser("operations", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 197, 3152], help="numbers of tokens")
    parser.add_argument("--operations", action="store_true", help="list the operations")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    rows = [["method", "tokens", *SHAPES, "mean", "calls of a forward"]]
    details = []
    for name, method in METHODS.items():
        if name == "full":
            continue
        for tokens in options.tokens:
            found = [added(method.apply, *shape, tokens=tokens) for shape in SHAPES.values()]
            mean = sum(layer.count for layer in found) / len(found)
            counts = [str(layer.count) for layer in found]
            rows.append([method.title, f"{tokens}", *counts, f"{mean:.1f}", f"{max(layer.calls for layer in found)}"])
            details += [
                f"{method.title}, {tokens} tokens, {shape}: {dict(layer.operations)}, {layer.accumulations} sums"
                for shape, layer in zip(SHAPES, found, strict=True)
            ]
    print(table(rows), end="")
    if options.operations:
        print("\n".join(["", *details]))


if __name__ == "__main__":
    main()
