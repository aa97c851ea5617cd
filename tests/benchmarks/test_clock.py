"""The table of step times pairs the methods round by round."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from benchmarks import clock
from benchmarks.workloads import WORKLOADS


def test_the_interval_of_a_median_lies_between_two_of_the_ratios() -> None:
    ratio = clock.Ratio.of([float(i) for i in range(1, 101)], [2.0] * 100)
    # The 40th and the 61st of 100 ordered values: 39 or fewer of 100 tosses have a chance of 1.8%.
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (25.25, 20.0, 30.5, 100)
    few = clock.Ratio.of([1.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    assert (few.median, few.low, few.high) == (2.0, 1.0, 3.0)


def test_a_disturbance_of_a_round_cancels() -> None:
    assert str(clock.Ratio.of([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])) == "2.00 (2.00-2.00)"


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=2, num_classes=3)

    monkeypatch.setitem(WORKLOADS, "vit_s_few", replace(WORKLOADS["vit_s_few"], build=small))
    path = tmp_path / "clock.md"
    options = "--workloads vit_s_few --sizes 2 --modes FLOPs eager --blocks 1 --seconds 0 --device cpu".split()
    options += ["--output", str(path)]
    clock.main(options)
    head, *table = path.read_text(encoding="utf-8").split("\n\n")
    assert "rank 32" in head and "torch" in head
    lines = [line.split(" | ") for line in table[0].splitlines()]
    assert len(lines) == 4 and "PEFT LoRA" not in lines[0] and "PEFT VeRA" in lines[0]
    assert float(lines[2][1]) > 1  # the FLOPs of full fine-tuning
    assert lines[3][0] == "| ViT-S/14 of 28 x 28 pixels, 2 images, eager" and lines[3][-2:] == ["1", "5 |"]
    for figure in lines[3][1:-2]:
        middle, low, high = map(float, re.findall(r"[0-9.]+", figure))
        assert 0.01 < low <= middle <= high < 100
    before = path.read_text(encoding="utf-8").splitlines()
    clock.main([*options[:5], "FLOPs", *options[7:], "--sizes", "3"])
    after = path.read_text(encoding="utf-8").splitlines()
    assert after[:-1] == before and after[-1].startswith("| ViT-S/14 of 28 x 28 pixels, 3 images, FLOPs | ")
