"""The training of the emoji demo: what the transformer is told, and how an interrupted training goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.emoji import pipeline
from benchmarks.emoji.drawings import write_drawings
from benchmarks.emoji.teach import T5_LENGTH, Teaching, Trained, teach
from randlora_vision.demos import emoji

PROMPTS = [["a red heart", "a red heart on a blue background"], ["grapes", "grapes on a blue background"]]
LITTLE = Teaching(steps=4, batch_size=2, warmup=1, compiled=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pipeline.make_tokenizer(prompt for row in PROMPTS for prompt in row)


def build(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Any:
    monkeypatch.setitem(pipeline._TRANSFORMER, "num_layers", 2)
    torch.manual_seed(0)
    return pipeline.build(tokenizer)


def test_an_interrupted_training_ends_where_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    pictures = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole, halves = build(monkeypatch, tokenizer), build(monkeypatch, tokenizer)
    teach(whole, pictures, PROMPTS, LITTLE, tmp_path / "whole.ckpt")
    start = {name: tensor.clone() for name, tensor in halves.transformer.state_dict().items()}
    rate = Teaching.rate
    monkeypatch.setattr(Teaching, "rate", lambda how, step: rate(LITTLE, step))
    teach(halves, pictures, PROMPTS, replace(LITTLE, steps=2), tmp_path / "halves.ckpt")
    halves = build(monkeypatch, tokenizer)
    teach(halves, pictures, PROMPTS, LITTLE, tmp_path / "halves.ckpt")
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(halves.transformer.state_dict()[name], tensor)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in whole.transformer.state_dict().items())


def test_the_transformer_is_told_what_the_pipeline_tells_it(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    pipe = build(monkeypatch, tokenizer)
    ids = pipe.tokenizer(["grapes"], padding="max_length", return_tensors="pt").input_ids
    expected, _, pooled, _ = pipe.encode_prompt("grapes", None, None, max_sequence_length=T5_LENGTH)
    sequence, told = Trained(pipe).eval().prompts(ids)
    assert torch.allclose(sequence, expected, atol=1e-6) and torch.allclose(told, pooled, atol=1e-6)


def test_written_drawings_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = {name: picture for name, picture in list(emoji.drawings().items())[-14:]}
    assert emoji.SUBJECT in drawings
    write_drawings(drawings, tmp_path)
    monkeypatch.setattr(emoji, "_FOLDER", tmp_path)
    emoji.drawings.cache_clear()
    try:
        again = emoji.drawings()
    finally:
        emoji.drawings.cache_clear()
    assert list(again) == list(drawings)
    assert all(torch.allclose(again[name], picture, atol=1.01 / 255) for name, picture in drawings.items())
