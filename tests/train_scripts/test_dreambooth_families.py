"""train_dreambooth.py on a tiny pipeline of each kind of family: pictures, the check of the saved file, and resuming.

What differs between the families, tests/training/dreambooth/test_families.py tries for each: encoding, prediction,
latents, training, and an adapter loaded into a fresh pipeline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from randlora_vision.training.dreambooth import task
from randlora_vision.training.dreambooth.families import Family
from tests.tiny_families import LENGTHS, SIZES, TINY, small_edits
from tests.training_helpers import draw_nothing, script
from tests.video_helpers import write_video

PROMPT = "a photo of sks digit"
FAST = ("qwen_image",)  # texts of any length, packed latents, a VAE with statistics
ONCE = ("hidream", "lumina2", "pixart_sigma")
"""What these add to the other kinds is not in a checkpoint: their runs do not go on."""
KINDS: dict[str, tuple[str, ...]] = {  # with the flags that are tried on them
    **{"sd_inpaint": (), "qwen_image_edit_plus": ()},  # masks, and several images beside the trained ones
    **{"hidream": (), "lumina2": ()},  # many text encoders, a language model
    "sana": ("--offload-base", "disk"),  # a VAE without a distribution
    "flux2": ("--quantize", "torchao-int8"),  # a VAE with batch normalisation
    "pixart_sigma": (),  # a learned variance
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",  # a scheduler of diffusers with NumPy 2
    "ignore:Mismatch dtype between input and weight:UserWarning",  # norms in float32; said once, by the first run
)


CASES: list[Any] = [pytest.param(name, (), id=name) for name in FAST]
CASES += [pytest.param(name, flags, id=name, marks=pytest.mark.slow) for name, flags in KINDS.items()]
CASES.append(
    pytest.param(
        "flux_kontext",
        ("--method", "full", "--use-8bit-adam", "--mixed-precision", "bf16", "--gradient-checkpointing"),
        id="low-memory",
        marks=pytest.mark.slow,
    )
)
CASES += [
    pytest.param(name, ("--num-frames", "5", "--no-cache-latents"), id=f"{name}-clips", marks=pytest.mark.slow)
    for name in ("wan_experts", "ltx")
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_a_run_of_each_kind_and_going_on_to_the_same_bytes(
    name: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    monkeypatch.setattr(task, "_MEASURED", 2)
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
    if "--num-frames" in flags:
        write_video(tmp_path / "images/clip.mkv", [number / 20 for number in range(12)])
        settings["--batch-size"] = 1
    if "--use-8bit-adam" in flags:
        pytest.importorskip("bitsandbytes")
        del settings["--rank"]  # full fine-tuning, as the weights of tiny adapters are too few for states of 8 bits
    small_edits(monkeypatch)
    edits = {"flux_kontext": ["originals"], "qwen_image_edit": ["originals"]}
    edits["qwen_image_edit_plus"] = ["originals", "images"]
    given = ["--cond-data-dir", *(tmp_path / folder for folder in edits[name])] if name in edits else []
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
            [*words, "--output-dir", str(tmp_path / folder), *map(str, (*prior, *given, *flags, *more))]
        )
        return tmp_path / folder

    first = run("first", "--checkpoint-every", 1)
    assert len(loaded) == 2  # the second one for the check of the file
    assert json.loads((first / "summary.json").read_text())["reload_difference"] == 0
    with Image.open(first / "samples/step-000002/0-0.png") as picture:
        assert picture.size == (width * (3 if "--num-frames" in flags else 1), height)  # three frames of a clip
    if "--num-frames" in flags:
        assert "clip.mkv" in (first / "split.json").read_text()
        with Image.open(first / "samples/step-000002/0-0.webp") as animation:
            assert animation.n_frames == 5 and animation.size == (width, height)
    if "--use-8bit-adam" in flags:
        states = load_file(first / "checkpoints/step-000001/tensors.safetensors")
        assert torch.uint8 in {tensor.dtype for tensor in states.values()}
    if name in ONCE:
        return
    second = shutil.copytree(first, tmp_path / "second")
    (second / "adapter.safetensors").unlink()
    run("second", "--resume", second / "checkpoints/step-000001")
    assert (second / "adapter.safetensors").read_bytes() == (first / "adapter.safetensors").read_bytes()
