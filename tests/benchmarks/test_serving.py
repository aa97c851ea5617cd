"""The benchmark of many adapters compares models that do the same: an adapter per sample, and one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.serving import KINDS, PEFT, many, mixed_batch, served
from benchmarks.workloads import Layer


@pytest.mark.parametrize("method", [PEFT, *KINDS])
def test_a_mixed_batch_is_that_of_its_samples(method: str) -> None:
    torch.manual_seed(0)
    one = served(method, nn.Sequential(Layer(64, 96)), ["0.layer"], ["a", "b"])
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x, names = torch.randn(3, 5, 64), ["b", "a", "b"]
    expected = []
    for sample, name in zip(x, names, strict=True):
        one.switch(name)
        expected.append(one.model(sample[None]))
    torch.testing.assert_close(mixed_batch(one, names, x), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_table_of_switching() -> None:
    lines = list(many([2], rounds=1))
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {method}" for method in (PEFT, *KINDS)]
    kilobytes = [float(line.split(" | ")[4].removesuffix(" KB")) for line in lines[2:]]
    assert kilobytes[0] == pytest.approx(kilobytes[1], rel=0.2) and kilobytes[1] == kilobytes[2] > 1
