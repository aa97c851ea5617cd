"""The benchmark of many adapters compares models that do the same: an adapter per sample, and one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.serving import KINDS, PEFT, batches, many, mixed_batch, served
from benchmarks.workloads import WORKLOADS, Layer


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
    _, *rows = many([2], rounds=1)
    assert [row[0] for row in rows] == [PEFT, *KINDS]
    kilobytes = [float(row[5].removesuffix(" KB")) for row in rows]
    assert kilobytes[0] == pytest.approx(kilobytes[1], rel=0.2) and kilobytes[1] == kilobytes[2] > 1


@pytest.mark.slow
def test_the_tables_of_mixed_batches_and_of_kept_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=224, patch_size=112, embed_dim=64, depth=1, num_heads=2, num_classes=3)

    monkeypatch.setitem(WORKLOADS, "vit_s", replace(WORKLOADS["vit_s"], build=small))
    _, *rows = batches(2, 1)
    operations = {(row[0], row[1]): int(row[3].replace(",", "")) for row in rows}
    for method in KINDS:
        assert operations[method, "1 of 2"] == operations[method, "2 of 2"]
    assert operations[PEFT, "1 of 2"] < operations[PEFT, "2 of 2"]
    rows = memory.costs("vit_s", [2])
    assert len(rows) == 1 + len(memory.CHOICES) + len(memory.CHECKPOINTED)
    assert rows[1] == ["PEFT RandLora", "1.00", "1.00"]
