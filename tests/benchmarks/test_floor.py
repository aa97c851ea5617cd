"""The parts of a step: the narrow model runs the operations of the wide one, and the shares add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from benchmarks import floor
from benchmarks.methods import METHODS
from benchmarks.operations import SHAPES, added
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize("method", ["peft_lora", "ours", "ours_structured"])
def test_narrow_layers_run_the_same_operations(method: str) -> None:
    narrow = WORKLOADS["vit_narrow"]
    for inputs, outputs in SHAPES.values():
        wide = added(METHODS[method].apply, inputs, outputs, tokens=5)
        small = added(METHODS[method].apply, inputs // 16, outputs // 16, tokens=5, rank=narrow.rank)
        assert small.operations == wide.operations and small.calls == wide.calls


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=2, num_classes=3)

    for name in ("vit_s_few", "vit_narrow"):
        monkeypatch.setitem(WORKLOADS, name, replace(WORKLOADS[name], build=small))
    path = tmp_path / "floor.md"
    options = ["--rows", "1", "--methods", "peft_lora", "ours", "--blocks", "1", "--seconds", "0"]
    floor.main([*options, "--output", str(path)])
    head, table = path.read_text(encoding="utf-8").split("\n\n")
    assert "rank 32" in head and "torch" in head
    lora, ours = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert lora[:2] == ["5", "PEFT LoRA"] and lora[3] == "1.00" and int(ours[2]) > int(lora[2])
    for row in (lora, ours):
        assert float(row[6]) == pytest.approx(float(row[4]) + float(row[5]), abs=0.011)
        assert float(row[7]) == pytest.approx(float(row[6]) + 1 - float(lora[6]), abs=0.016)
