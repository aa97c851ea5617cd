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
from randlora_vision.training.dreambooth.families import Family
from tests.tiny_families import LENGTHS, SIZES, TINY, small_edits
from tests.training_helpers import draw_nothing, script

PROMPT = "a photo of sks digit"
FAST = ("qwen_image",)  # texts of any length, packed latents, a VAE with statistics
pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",  # a scheduler of diffusers with NumPy 2
)


CASES: list[Any] = [pytest.param(name, (), id=name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TINY]
CASES += [
    pytest.param("flux_kontext", flags, id=flags[1], marks=pytest.mark.slow)
    for flags in (("--quantize", "torchao-int8"), ("--offload-base", "disk"))
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_a_run_of_every_family_goes_on_to_the_same_bytes(
    name: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    monkeypatch.setattr(task, "_MEASURED", 4)
    TINY[name]().save_pretrained(tmp_path / "base")
    for turn, folder in enumerate(("images", "originals")):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.linear_gradient("L").rotate(90 * (number + turn)).save(tmp_path / folder / f"{number}.png")
    height, width = SIZES.get(name, (16, 32))
    settings = {
        "--pretrained-model-name-or-path": tmp_path / "base",
        "--instance-data-dir": tmp_path / "images",
        "--instance-prompt": PROMPT,
        "--aspect-ratio-buckets": f"{height},{width}",
        "--max-sequence-length": LENGTHS.get(name, 64),
        "--validation-prompt": "a dog",
        "--num-validation-images": 1,
        "--num-inference-steps": 2,
        "--num-prior-images": 1,
        "--report-to": "none",
        "--steps": 2,
        "--rank": 4,
        "--lr": 0.01,
    }
    small_edits(monkeypatch)
    if name in ("flux_kontext", "qwen_image_edit"):
        settings["--cond-data-dir"] = tmp_path / "originals"
    prior = ["--with-prior-preservation", "--class-prompt", "a dog", "--num-class-images", 2] * (name == "sd_inpaint")

    load_denoiser, loaded = Family.load_denoiser, []

    def after_the_text(family: Family) -> None:
        assert all(getattr(family.pipe, name) is None for name in family.text_encoder_names)
        assert all(parameter.is_meta for parameter in family.denoiser.parameters())
        load_denoiser(family)
        loaded.append(family)

    monkeypatch.setattr(Family, "load_denoiser", after_the_text)

    def run(folder: str, *more: Any) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):  # as in a separate process
            state._shared_state.clear()
        words = [str(word) for pair in settings.items() for word in pair]
        script("train_dreambooth").main(
            [*words, "--output-dir", str(tmp_path / folder), *map(str, (*prior, *flags, *more))]
        )
        return tmp_path / folder

    first = run("first", "--checkpoint-every", 1)
    assert len(loaded) == 2  # the second one for the check of the file
    assert json.loads((first / "summary.json").read_text())["reload_difference"] == 0
    assert (first / "samples/step-000002/0-0.png").exists()
    second = shutil.copytree(first, tmp_path / "second")
    (second / "adapter.safetensors").unlink()
    run("second", "--resume", second / "checkpoints/step-000001")
    assert (second / "adapter.safetensors").read_bytes() == (first / "adapter.safetensors").read_bytes()
