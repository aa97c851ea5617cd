"""train_dreambooth.py on a tiny pipeline of every family: pictures, the check of the saved file, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from randlora_vision.training.dreambooth import task
from tests.tiny_families import SIZES, TINY
from tests.training_helpers import draw_nothing, script

PROMPT = "a photo of sks digit"
FAST = ("qwen_image",)  # texts of any length, packed latents, a VAE with statistics
pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",  # a scheduler of diffusers with NumPy 2
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TINY])
def test_a_run_of_every_family_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    monkeypatch.setattr(task, "_MEASURED", 4)
    TINY[name]().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.linear_gradient("L").rotate(90 * number).save(tmp_path / f"images/{number}.png")
    height, width = SIZES.get(name, (16, 32))
    settings = {
        "--pretrained-model-name-or-path": tmp_path / "base",
        "--instance-data-dir": tmp_path / "images",
        "--instance-prompt": PROMPT,
        "--aspect-ratio-buckets": f"{height},{width}",
        "--max-sequence-length": 64,
        "--validation-prompt": "a dog",
        "--num-validation-images": 1,
        "--num-inference-steps": 2,
        "--num-prior-images": 1,
        "--report-to": "none",
        "--steps": 2,
        "--rank": 4,
        "--lr": 0.01,
    }

    def run(folder: str, *more: Any) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):  # as in a separate process
            state._shared_state.clear()
        words = [str(word) for pair in settings.items() for word in pair]
        script("train_dreambooth").main([*words, "--output-dir", str(tmp_path / folder), *map(str, more)])
        return tmp_path / folder

    first = run("first", "--checkpoint-every", 1)
    assert json.loads((first / "summary.json").read_text())["reload_difference"] == 0
    assert (first / "samples/step-000002/0-0.png").exists()
    second = shutil.copytree(first, tmp_path / "second")
    (second / "adapter.safetensors").unlink()
    run("second", "--resume", second / "checkpoints/step-000001")
    assert (second / "adapter.safetensors").read_bytes() == (first / "adapter.safetensors").read_bytes()
