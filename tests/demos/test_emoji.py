"""The emoji that ship with the package: the pipeline draws them, the judge knows them, and all of it is small."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from randlora_vision.demos import emoji
from randlora_vision.demos.emoji import BACKGROUNDS, SUBJECT, drawings, on_background, placed, prompt_of
from randlora_vision.demos.subject import recognise


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = emoji.demo_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def test_the_pipeline_draws_what_it_is_asked_for(pipe: Any) -> None:
    asked = [("red heart", "white"), ("blue square", "yellow"), ("skull", "blue"), ("strawberry", "white")]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
    prompts = [placed(prompt_of(name), place) for name, place in asked]
    settings: dict[str, Any] = dict(num_inference_steps=8, guidance_scale=2.0, max_sequence_length=4)
    pictures = pipe(prompts, generator=seeds, output_type="pt", **settings).images
    real = torch.stack([on_background(drawings()[name], place) for name, place in asked])
    wrong = real.roll(1, 0)
    assert ((pictures - real).square().mean((1, 2, 3)) < 0.3 * (wrong - real).square().mean((1, 2, 3))).all()


def test_the_vae_gives_pixels_back(pipe: Any) -> None:
    pictures = 2 * torch.rand(2, 3, 32, 32) - 1
    latents = pipe.vae.encode(pictures).latent_dist.sample()
    assert torch.allclose(latents, pictures, atol=1e-5)
    assert torch.allclose(pipe.vae.decode(latents).sample, pictures, atol=1e-5)


def test_the_subject_is_unknown_to_the_vocabulary(pipe: Any) -> None:
    known = [name for name in drawings() if name != SUBJECT]
    words = lambda name: pipe.tokenizer(name)["input_ids"][1:-1]  # noqa: E731
    assert all(len(words(name)) == len(name.replace("-", " - ").split()) for name in known)
    assert len(words(SUBJECT)) > 1
    longest = max(len(words(placed(prompt_of(name), place))) for name in [*known, "sks face"] for place in BACKGROUNDS)
    assert longest + 2 <= pipe.tokenizer.model_max_length


@pytest.mark.parametrize("place", BACKGROUNDS)
def test_the_judge_knows_the_drawings_themselves(place: str) -> None:
    pictures = torch.stack([on_background(picture, place) for picture in drawings().values()])
    assert recognise(pictures) == [(name, place) for name in drawings()]


def test_the_images_of_the_subject_are_told_from_all_others() -> None:
    images = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in emoji.subject_images()]
    pictures = torch.stack(images).view(5, 32, 32, 3).permute(0, 3, 1, 2) / 255
    assert recognise(pictures) == [(SUBJECT, "white")] * 5
    assert len({tuple(image.tolist()) for image in images}) == 5


def test_what_ships_is_small_and_harmless() -> None:
    folder = emoji.demo_pipeline_folder().parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".png", ".md"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Apache License" in text and "python -m benchmarks.emoji" in text
    config = json.loads((emoji.demo_pipeline_folder() / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert config["sample_size"] == emoji.PIXELS
