"""The bytes that a DreamBooth run needs: counted as they are freed, for options that the script has."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from benchmarks import dreambooth
from benchmarks.live import LiveBytes
from randlora_vision.train_scripts import train_dreambooth as script

T, D, LAYERS = 64, 32, 8


@pytest.mark.parametrize("row", dreambooth.ROWS)
def test_rows_are_options_of_the_script(row: str) -> None:
    argv = ["--pretrained-model-name-or-path", "x", "--instance-data-dir", "y", *dreambooth.ROWS[row]]
    options = script.parse(script.DreamBoothOptions, argv, "", script.DIFFUSERS, script.DEFAULTS.help())
    assert script.resolve(options).training.lr > 0


def peak(checkpointed: bool) -> int:
    """The most bytes in a step of a chain of activations (T, D) without weights."""
    chain = nn.Sequential(*(nn.Sigmoid() for _ in range(LAYERS)))
    with LiveBytes() as live:
        x = torch.zeros(T, D, requires_grad=True)
        y = checkpoint_sequential(chain, LAYERS, x, use_reentrant=False) if checkpointed else chain(x)
        y.sum().backward()
        assert live.now <= 5 * 4 * T * D  # what the step kept is gone: input, output, gradient
    return live.peak


def test_live_bytes_are_those_of_the_tensors_that_exist() -> None:
    """A sigmoid keeps its output: all of them, or of a checkpointed chain its inputs, which are as many."""
    one = 4 * T * D
    assert (LAYERS + 1) * one <= peak(False) <= (LAYERS + 4) * one
    assert peak(True) <= (LAYERS + 5) * one
    with LiveBytes() as live:
        live.see([torch.zeros(10)])
        assert (live.now, live.peak) == (0, 40)  # it is freed at once
        kept = torch.zeros(6)
        view = kept[2:]
        assert live.now == 24
        del kept, view
        assert live.now == 0


def test_the_table_says_what_the_options_save() -> None:
    rows = json.loads(dreambooth.RESULTS.read_text())["rows"]
    assert list(rows) == list(dreambooth.ROWS)
    default, together = (next(row for name, row in rows.items() if name.startswith(words))
                         for words in ("the default", "all parts"))  # fmt: skip
    denoiser = 4 * json.loads(dreambooth.RESULTS.read_text())["parameters"]["transformer"]
    assert together["encoding"] - default["encoding"] == pytest.approx(denoiser, rel=0.02)
    for name, row in rows.items():
        assert row["estimate"] <= row["training"], name
        if "checkpointing" in name or "bf16" in name or "disk" in name:
            assert row["training"] < 0.9 * default["training"], name
    packed = (
        rows["`--quantize torchao-int8`"]["training"]
        - rows["`--quantize torchao-int8 --gradient-checkpointing`"]["training"]
    )
    assert packed > default["training"] - rows["`--gradient-checkpointing`"]["training"]  # unpacked weights go too
    assert rows["`--use-8bit-adam`"]["training"] == pytest.approx(default["training"], rel=0.02)
    assert rows["`--method full --use-8bit-adam`"]["training"] < 0.8 * rows["`--method full`"]["training"]
