"""Loading of a pipeline that can be trained."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions


def load_family(
    path: str,
    options: ObjectiveOptions,
    max_sequence_length: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Family:
    """Load a pipeline and return its family; the VAE stays in float32.

    Raises ValueError for an unsupported pipeline class or denoiser, and OSError if diffusers finds no pipeline.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ValueError(f"diffusers is needed: pip install 'randlora_vision[diffusers]' ({error})") from error
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/", "~"))):
        raise ValueError(f"--pretrained-model-name-or-path {path} is not a pipeline folder written by save_pretrained")
    index = DiffusionPipeline.load_config(path, revision=revision)
    name = index.get("_class_name")
    family = FAMILIES.get(str(name))
    if family is None:
        raise ValueError(
            f"{path} is a {name}, which cannot be trained; the nearest that can is {nearest(str(name))}; supported "
            f"pipelines: {', '.join(sorted(FAMILIES))}"
        )
    pipe = DiffusionPipeline.from_pretrained(
        path,
        revision=revision,
        variant=variant,
        dtype={"default": dtype, "vae": torch.float32},
        **{**_left_out(index), **family.loading},
    )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return family(pipe, options, max_sequence_length)


def _left_out(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the components that the pipeline was saved without, such as the T5 of Stable Diffusion 3."""
    return {part: None for part, home in index.items() if home == [None, None]}


def nearest(name: str) -> str:
    """Return the supported pipeline whose name is most like `name`: the longest that it begins with, if any."""
    kind = name.removesuffix("Pipeline")
    begins = [family for family in FAMILIES if kind.startswith(family.removesuffix("Pipeline"))]
    return max(begins, key=len) if begins else difflib.get_close_matches(name, FAMILIES, 1, 0)[0]
