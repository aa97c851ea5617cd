"""What an adapted layer adds to a step besides FLOPs stays small: on a GPU, small layers are bound by launches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods import METHODS
from benchmarks.operations import Operations, added, python_calls
from randlora_vision import RandLoRAConfig, inject
from randlora_vision.compute.planner import PINNED

SHAPES = ((64, 192), (64, 64), (256, 64))
"""Inputs and outputs of a tall, a square and a wide layer, for which structured bases need no padding."""
PADDED = ((60, 190), (61, 61), (190, 60))
"""The same for sides that they do not divide."""
FEW, MANY = 5, 2000
OPERATIONS = {"peft_lora": 9, "ours": 12, "ours_structured": 20}
"""Added device operations of a step."""
CALLS = 20
"""Calls in Python of a forward pass of a layer with one adapter; two of them are PyTorch's."""


@pytest.mark.parametrize("method", OPERATIONS)
def test_added_operations(method: str) -> None:
    for inputs, outputs in SHAPES:
        for tokens in (FEW, MANY):
            found = added(METHODS[method].apply, inputs, outputs, tokens=tokens, rank=8)
            # Where structured bases build W and yet compute the gradient from the tokens, there is one more.
            more = int(method == "ours_structured" and tokens == MANY)
            assert found.count <= OPERATIONS[method] + more, (inputs, outputs, tokens, found)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compute", PINNED)
@pytest.mark.parametrize("bases", ["uniform", "normal", "sparse", "peft", "structured"])
def test_calls_of_a_forward_pass(bases: Any, compute: Any, dropout: float) -> None:
    config = RandLoRAConfig(rank=8, bases=bases, compute=compute, dropout=dropout, target_modules=["weight"])
    for (inputs, outputs), bias in itertools.product((*SHAPES, *PADDED), (True, False)):
        layer = nn.Linear(inputs, outputs, bias)
        inject(layer, config)
        x = torch.randn(1, FEW, inputs, requires_grad=True)
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                layer(x)  # what is made once
                calls = python_calls(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
            more = low + (dropout > 0) if bases == "structured" else 0
            assert calls <= CALLS + more, (inputs, outputs)


def test_what_counts_as_an_operation() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    with Operations() as operations:
        (x.view(4, 3).t() * 2).contiguous()
        torch.empty(3)
    assert dict(operations.counts) == {"mul": 1, "clone": 1}
    with Operations() as operations:
        (x.exp() + x.sin()).backward(torch.ones(3, 4))
    assert operations.accumulations == 1 and operations.counts["add"] == 1


def test_additions_of_a_function_are_not_sums_of_gradients() -> None:
    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad + 1

    x = torch.ones(3, requires_grad=True)
    with Operations() as operations:
        Shifted.apply(x).backward(torch.ones(3))
    assert operations.accumulations == 0 and operations.counts["add"] == 2


def test_calls_are_those_of_python_functions() -> None:
    layer = nn.Linear(2, 2)
    assert python_calls(lambda: layer(torch.ones(1, 2))) == 5  # __call__, _call_impl, forward, two attributes
