"""Adapted denoisers in other pipelines of diffusers, against the same pipelines around plain weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize
from tests.pipeline_helpers import adapt, deltas, difference, plain
from tests.tiny_pipelines import PIPELINES, PIXELS
from tests.zoo.base import unmute

CLOSE = 3e-3
SIZE = {"height": PIXELS, "width": PIXELS}
PROMPT = "a photo of sks digit"


def picture() -> Image.Image:
    values = (torch.arange(PIXELS * PIXELS * 3) % 251).to(torch.uint8)
    return Image.fromarray(values.reshape(PIXELS, PIXELS, 3).numpy())


def mask() -> Image.Image:
    return Image.fromarray((torch.eye(PIXELS) * 255).to(torch.uint8).numpy())


@torch.no_grad()
def run(pipe: Any, *prompt: str, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*prompt, generator=generator, output_type="pt", **{"num_inference_steps": 4, **options}).images[0]


def image_to_image(pipe: Any) -> Tensor:
    from diffusers import AutoPipelineForImage2Image

    return run(AutoPipelineForImage2Image.from_pipe(pipe), PROMPT, image=picture(), strength=0.5)


def inpainting(pipe: Any) -> Tensor:
    from diffusers import AutoPipelineForInpainting

    # Each step of a random SDXL amplifies rounding errors.
    options = dict(image=picture(), mask_image=mask(), strength=0.9, num_inference_steps=2, **SIZE)
    return run(AutoPipelineForInpainting.from_pipe(pipe), PROMPT, **options)


def refined(pipe: Any) -> Tensor:
    """The adapted UNet makes the first half of the steps, a plain one the second half, from latents."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe.set_progress_bar_config(disable=True)
    first = pipe(
        PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=4, denoising_end=0.5,
        output_type="latent", **SIZE,
    ).images  # fmt: skip
    refiner = StableDiffusionXLImg2ImgPipeline.from_pipe(PIPELINES["sdxl"]())
    return run(refiner, PROMPT, image=first, denoising_start=0.5)


def control_net(pipe: Any) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    options = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    taken = ("block_out_channels", "cross_attention_dim", "attention_head_dim", "down_block_types", "layers_per_block",
             "norm_num_groups")  # fmt: skip
    net = ControlNetModel(**{name: options[name] for name in taken}, conditioning_embedding_out_channels=(8, 16))
    unmute(net)
    return net


def controlled(pipe: Any) -> Tensor:
    from diffusers import StableDiffusionControlNetPipeline

    # The residuals of a random ControlNet amplify rounding errors from step to step.
    net = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control_net(pipe)).to(torch.float64)
    return run(net, PROMPT, image=picture(), controlnet_conditioning_scale=0.2, num_inference_steps=2, **SIZE)


COMPANY: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "img2img of sd15": ("sd15", image_to_image),
    "img2img of sd3": ("sd3", image_to_image),
    "inpainting of sd15": ("sd15", inpainting),
    "inpainting of sdxl": ("sdxl", inpainting),
    "refiner": ("sdxl", refined),
    "ControlNet": ("sd15", controlled),
}


@pytest.mark.parametrize("kind", COMPANY)
def test_other_pipelines_around_adapted_components(kind: str) -> None:
    family, call = COMPANY[kind]
    pipe = PIPELINES[family]()
    reports = adapt(pipe)
    truth = call(plain(family, deltas(pipe, reports)))
    assert difference(call(PIPELINES[family]()), truth) > 0.05
    assert difference(call(pipe), truth) < CLOSE
    if family != "sdxl":  # fused weights are those of a plain pipeline in any company
        integration.fuse(pipe)
        assert difference(call(pipe), truth) < CLOSE


def test_an_adapter_in_a_control_net() -> None:
    """A ControlNet takes adapters of its own, and the functions for pipelines find them."""
    from diffusers import StableDiffusionControlNetPipeline

    pipe = PIPELINES["sd15"]()
    net = control_net(pipe)
    both = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    options = dict(image=picture(), num_inference_steps=2, **SIZE)
    base = run(both, PROMPT, **options)
    inject(net, RandLoRAConfig(rank=4, target_modules="diffusers:backbone"))
    randomize(net)
    adapted = run(both, PROMPT, **options)
    assert difference(adapted, base) > 0.05
    with integration.disabled(both):
        assert torch.equal(run(both, PROMPT, **options), base)
    integration.fuse(both)
    assert difference(run(both, PROMPT, **options), adapted) < 0.02
