"""Denoisers that sampling conditions on more than training gives: refused before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from tests.tiny_pipelines import FLUX, PIPELINES, SD3, SD15, SDXL

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "LCM": ("sd15", {"time_cond_proj_dim": 8}, "the guidance scale is an input .time_cond_proj_dim=8.*distilled from"),
    "LCM of SDXL": ("sdxl", {"time_cond_proj_dim": 8}, "the guidance scale is an input"),
    "inpainting": ("sd15", {"in_channels": 9}, "takes 9 channels, but the latents have 4; .*inpainting"),
    "editing of SDXL": ("sdxl", {"in_channels": 8}, "takes 8 channels, but the latents have 4"),
    "inpainting of SD3": ("sd3", {"in_channels": 9}, "takes 9 channels, but the latents have 4"),
    "Flux with a control": ("flux", {"in_channels": 32}, "takes 32 channels, but the latents have 16"),
    "learned variance": ("sd15", {"out_channels": 8}, "predicts 8 channels, but the latents have 4"),
    "noise level": ("sd15", {"num_class_embeds": 10}, "class labels or noise levels .num_class_embeds=10."),
    "unCLIP": ("sd15", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    "image embedding": (
        "sd15",
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8},
        "needs image embeddings .encoder_hid_dim_type='image_proj'.*unload_ip_adapter",
    ),
    "added image": (
        "sd15",
        {"addition_embed_type": "image", "encoder_hid_dim": 8},
        "addition_embed_type='image'.*StableDiffusionPipeline can be trained with: none",
    ),
    "added sizes": (
        "sd15",
        {key: SDXL[key] for key in ("addition_embed_type", "addition_time_embed_dim")}
        | {"projection_class_embeddings_input_dim": SDXL["projection_class_embeddings_input_dim"]},
        "addition_embed_type='text_time'",
    ),
    "refiner": (
        "sdxl",
        {"projection_class_embeddings_input_dim": SDXL["projection_class_embeddings_input_dim"] - 8},
        "takes 5 numbers beside the text, .*aesthetic score",
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {"sd15": SD15, "sdxl": SDXL, "sd3": SD3, "flux": FLUX}


def changed(kind: str, options: dict[str, Any]) -> Any:
    pipe = PIPELINES[kind]()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, type(getattr(pipe, name))(**{**OPTIONS[kind], **options}))
    return pipe


def family_of(pipe: Any) -> Family:
    return FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(), None)


@pytest.mark.parametrize("case", CASES)
def test_conditioning_that_training_does_not_give_is_refused(case: str) -> None:
    kind, options, message = CASES[case]
    with pytest.raises(ValueError, match=f"^the .*Model of this pipeline cannot be trained: .*{message}"):
        family_of(changed(kind, options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd15", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32}),
        ("sdxl", {}),
        ("flux", {"guidance_embeds": False}),
    ],
)
def test_conditioning_on_the_text_alone_is_accepted(kind: str, options: dict[str, Any]) -> None:
    family_of(changed(kind, options))


@pytest.mark.parametrize(("kind", "name"), [("sd15", "encoder_hid_proj"), ("sd3", "image_proj")])
def test_an_attached_ip_adapter_is_refused(kind: str, name: str) -> None:
    pipe = PIPELINES[kind]()
    setattr(pipe.unet if kind == "sd15" else pipe.transformer, name, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"needs image embeddings .{name}.*unload_ip_adapter"):
        family_of(pipe)


def test_latents_that_the_pipeline_normalises_are_refused() -> None:
    pipe = PIPELINES["sdxl"]()
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="latents_mean and latents_std"):
        family_of(pipe)


def test_a_folder_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    changed("sd15", {"time_cond_proj_dim": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be trained: the guidance scale is an input"):
        load_family(str(tmp_path), ObjectiveOptions())
