"""The demo of DreamBooth: a tiny Stable Diffusion 3 that draws emoji by their names, and one that it does not know.

The folder noto/ holds its weights, the drawings that it was taught, and where they come from.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_FOLDER = Path(__file__).with_name("noto")
PIXELS = 32
SUBJECT = "robot"
BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 224, 130),
    "green": (165, 214, 167),
    "blue": (144, 202, 249),
    "pink": (248, 187, 208),
}
_PLURAL = ("grapes", "cherries", "french fries")


def demo_pipeline_folder() -> Path:
    """Return the folder of the pipeline, as `save_pretrained` writes one."""
    return _FOLDER / "pipeline"


def demo_pipeline() -> Any:
    """Return the pipeline, a StableDiffusion3Pipeline without T5. It was taught with `max_sequence_length=4`."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(demo_pipeline_folder(), text_encoder_3=None, tokenizer_3=None)


def subject_images() -> list[Image.Image]:
    """Return the five training images of the subject, a robot."""
    return [Image.open(path).convert("RGB") for path in sorted((_FOLDER / "subject").glob("*.png"))]


@cache
def drawings() -> dict[str, Tensor]:
    """Return the emoji by their names, those that the pipeline was taught and the subject.

    Each is a picture (4, 32, 32) between 0 and 1: colours multiplied by the opacity, and the opacity.
    """
    names = json.loads((_FOLDER / "drawings.json").read_text(encoding="utf-8"))
    with Image.open(_FOLDER / "drawings.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255
    pixels[:3] *= pixels[3:]
    rows = [picture for row in pixels.split(PIXELS, dim=1) for picture in row.split(PIXELS, dim=2)]
    return dict(zip(names, rows, strict=False))  # the last row may not be full


def on_background(pictures: Tensor, background: str) -> Tensor:
    """Return drawings (..., 4, 32, 32) on a background, by its name, as pixels (..., 3, 32, 32) between 0 and 1."""
    colour = torch.tensor(BACKGROUNDS[background]) / 255
    colours, opacity = pictures.split((3, 1), dim=-3)
    return colours + (1 - opacity) * colour[:, None, None]


def prompt_of(name: str) -> str:
    """Return the prompt for an emoji."""
    return name if name in _PLURAL else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def placed(prompt: str, background: str) -> str:
    """Return the prompt for a picture on that background; white is the background when none is named."""
    return prompt if background == "white" else f"{prompt} on a {background} background"
