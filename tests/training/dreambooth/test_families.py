"""Every family against its pipeline: what the pipeline gives its scheduler and its VAE, recorded while it samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.families import FAMILIES, Family, Seen
from randlora_vision.training.dreambooth.loading import load_family, nearest
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import adapt
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import DreamBoothAdapterOptions, DreamBoothOptions
from randlora_vision.training.dreambooth.results import base_model
from randlora_vision.training.dreambooth.samples import Gallery, Sampler, largest_difference
from randlora_vision.training.dreambooth.task import cut_note
from tests import tiny_families, tiny_pipelines
from tests.tiny_families import LENGTHS, SIZES

PROMPT = "a photo of sks digit"
PIPELINES = {**tiny_pipelines.PIPELINES, **tiny_families.TINY, "kolors": tiny_families.kolors}
PIPELINES |= {"wan_clips": tiny_families.wan, "ltx_clips": tiny_families.ltx}
CLIP = 5  # frames
pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    "ignore:`torch.jit.script` is deprecated:FutureWarning",  # the ChatGLM of diffusers
    "ignore:__array__ implementation:DeprecationWarning",  # a scheduler of diffusers with NumPy 2
)


@contextmanager
def means_for_draws() -> Iterator[None]:
    """Let distributions of latents give their means, as families do for what is around a mask."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Distribution

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distribution, "sample", lambda self, generator=None: self.mode())
        yield


def beside(family: Family, size: tuple[int, int], count: int = 1) -> tuple[Tensor, Tensor]:
    """Images, and masks or images to edit."""
    torch.manual_seed(4)
    pixels, given = (torch.rand(2, count, 3, *size) * 255).round() / 127.5 - 1
    if family.takes == "mask":
        given = torch.zeros(count, 1, *size)
        given[:, :, 3 : size[0] - 4, 5 : size[1] - 3] = 1
    if family.takes == "images":
        given = torch.stack([given, pixels.flip(-1)], dim=1)
    return pixels, given


class Recorded:
    """One picture of a pipeline without guidance, and what the scheduler and the VAE got while it was made."""

    def __init__(self, name: str) -> None:
        self.pipe = PIPELINES[name]()
        self.length = tiny_pipelines.CONTEXT if name in tiny_pipelines.PIPELINES else LENGTHS.get(name, 64)
        self.family: Family = FAMILIES[type(self.pipe).__name__](self.pipe, ObjectiveOptions(), self.length)
        self.family.num_frames = CLIP if name.endswith("clips") else 1
        self.size = SIZES.get(name, (32, 64) if name.startswith("ltx") else (16, 32))
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # prediction, timestep, before, after
        step, decode = self.pipe.scheduler.step, self.pipe.vae.decode

        def recorded_step(prediction: Tensor, timestep: Tensor, sample: Tensor, *rest: Any, **named: Any) -> Any:
            before = sample.clone()
            found = step(prediction, timestep, sample, *rest, **named)
            self.steps.append((prediction.clone(), timestep, before, found[0].clone()))
            return found

        def recorded_decode(latents: Tensor, *rest: Any, **named: Any) -> Any:
            self.raw = latents.clone()
            return decode(latents, *rest, **named)

        self.pipe.scheduler.step, self.pipe.vae.decode = recorded_step, recorded_decode
        height, width = self.size
        takes = inspect.signature(type(self.pipe).__call__).parameters
        options = {"max_sequence_length": self.length} if "max_sequence_length" in takes else {}
        built_in = self.family.denoiser.config.get("guidance_embeds")
        guidance = {self.family.guidance_argument: 3.5 if built_in else 1.0}
        if name == "z_image":
            guidance = {"guidance_scale": 0.0}
        if self.family.frame_rate is not None:
            options["num_frames"] = self.family.num_frames
        arguments = {**self.family.sampling, **guidance, **options, "num_inference_steps": 2, "output_type": "pt"}
        if name == "hidream":
            self.pipe.default_sample_size = (height * width * (1 + 1e-6)) ** 0.5 / self.pipe.vae_scale_factor
        self.pixels, self.given = beside(self.family, self.size)
        with torch.no_grad(), means_for_draws():
            arguments |= {"generator": torch.Generator().manual_seed(3), "height": height, "width": width}
            if self.family.takes == "mask":
                arguments |= {"image": self.pixels / 2 + 0.5, "mask_image": self.given}
            if self.family.sees:
                arguments |= {"image": seen(self.given[0]) if self.family.takes == "images" else seen(self.given[0])[0]}
            elif self.family.takes == "image":  # as pixels, which the pipeline encodes
                arguments |= {"image": self.given / 2 + 0.5, "max_area": height * width, "_auto_resize": False}
            picture = self.pipe(prompt=PROMPT, **arguments)[0][0]
        self.picture = picture if picture.ndim == 3 else picture.transpose(0, 1) if len(picture) > 1 else picture[0]
        self.pipe.scheduler.step, self.pipe.vae.decode = step, decode

    def unpack(self, latents: Tensor) -> Tensor:
        return self.family.unpack(latents, *self.size)


@pytest.fixture(autouse=True)
def edits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_families.small_edits(monkeypatch)


def prompts(family: Family, texts: list[str], given: Tensor) -> list[str]:
    """The texts, each with its image if the text encoder sees them."""
    if not family.sees:
        return texts
    return [Seen(text, seen(images)) for text, images in zip(texts, given, strict=True)]


def seen(images: Tensor) -> list[Any]:
    """One image (3, h, w), or several, as PIL images."""
    return [to_pil_image(image / 2 + 0.5) for image in (images if images.ndim == 4 else images[None])]


@pytest.fixture(scope="module")
def recorded() -> Any:
    made: dict[str, Recorded] = {}
    return lambda name: made.setdefault(name, made.get(name) or Recorded(name))


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_the_prediction_is_what_the_pipeline_gives_to_its_scheduler(name: str, recorded: Any) -> None:
    run = recorded(name)
    family, (height, width) = run.family, run.size
    original = (1024, 1024) if name == "hunyuan_dit" else run.size  # its default while sampling
    sizes = torch.tensor([[*original, 0, 0, height, width]])
    encoded = family.encode(prompts(family, [PROMPT], run.given))
    if family.takes:
        encoded["condition"] = family.condition(run.pixels, run.given)
    assert len(run.steps) == 2
    for prediction, timestep, before, _ in run.steps:
        found = family.predict(run.unpack(before), timestep.expand(1), encoded, sizes)
        expected = run.unpack(prediction)
        assert expected.std() > 1e-3 and found.shape == run.unpack(before).shape
        torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=1e-4, atol=1e-5)


GIVEN = ("sd_inpaint", "sdxl_inpaint", "flux_fill", "flux_kontext", "qwen_image_edit", "qwen_image_edit_plus")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_card_says_what_the_pipeline_does(name: str, recorded: Any) -> None:
    video = name.startswith(("wan", "ltx"))
    expected = "text-to-video" if video else "image-to-image" if name in GIVEN else "text-to-image"
    assert base_model(resolve(DreamBoothOptions()), recorded(name).family).task == expected


@pytest.mark.parametrize("name", GIVEN)
@torch.no_grad()
def test_pictures_are_made_from_the_images_shown(name: str, recorded: Any) -> None:
    run = recorded(name)
    family = run.family
    settings = {"num_inference_steps": 2, "guidance_scale": 3.5 if family.denoiser.config.get("guidance_embeds") else 1}
    with means_for_draws():
        latents = family.generate(
            run.pipe,
            family.encode(prompts(family, [PROMPT], run.given)),
            *run.size,
            generator=torch.Generator().manual_seed(3),
            **settings,
            **family.shown(run.pixels, run.given),
        )
    torch.testing.assert_close(family.decode(latents)[0], run.picture, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_latents_are_scaled_as_the_pipeline_undoes_it(name: str, recorded: Any) -> None:
    run = recorded(name)
    family, last = run.family, run.unpack(run.steps[-1][-1])
    raw = run.raw[:, :, 0] if run.raw.ndim > last.ndim else run.raw  # of an image by a VAE of videos
    torch.testing.assert_close(family.normalise(raw), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.decode(last)[0], run.picture, rtol=0, atol=1e-4)
    torch.manual_seed(1)
    clip = (CLIP,) * name.endswith("clips")
    pixels = torch.rand(1, 3, *clip, *run.size) * 2 - 1
    moments = family.moments(pixels)
    frames = pixels[:, :, None] if run.raw.ndim > pixels.ndim else pixels
    encoded = run.pipe.vae.encode(frames)
    mean = encoded.latent if name == "sana" else encoded.latent_dist.mean
    mean = mean[:, :, 0] if mean.ndim > last.ndim else mean
    assert not clip or mean.shape[2] > 1
    torch.testing.assert_close(moments[:, : mean.shape[1]], mean, rtol=1e-4, atol=1e-5)
    if name != "sana":  # without the noise of the distribution
        moments = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
    torch.testing.assert_close(family.latents(moments), family.normalise(mean), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_the_target_leads_the_scheduler_to_the_image(name: str, recorded: Any) -> None:
    """One step of diffusers' scheduler from a noisy latent, with the target as prediction, gives the clean latent."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    run = recorded(name)
    torch.manual_seed(2)
    clean = torch.randn(1, *run.unpack(run.steps[0][2]).shape[1:])
    noised = run.family.objective(clean)
    if "beta_schedule" in run.pipe.scheduler.config and "flow" not in run.pipe.scheduler.config.prediction_type:
        scheduler = DDIMScheduler.from_config(run.pipe.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(1000)
        found = scheduler.step(noised.target, noised.timesteps[0], noised.latents).pred_original_sample
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=(noised.timesteps / 1000).tolist())
        found = scheduler.step(noised.target, scheduler.timesteps[0], noised.latents)[0]
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd15", "flux2", "z_image", "wan", "qwen_image_edit"])
def test_a_prompt_whose_end_is_not_read_is_noted(name: str, recorded: Any) -> None:
    run = recorded(name)
    family, long = run.family, " ".join([PROMPT] * 90)
    if name == "qwen_image_edit":  # whose own words before the prompt are many tokens here
        family = type(family)(run.pipe, ObjectiveOptions(), 400)
    assert cut_note(family, prompts(family, ["dog", PROMPT], run.given[[0, 0]])) == ""
    note = cut_note(family, prompts(family, [long], run.given))
    if name == "qwen_image_edit":
        assert note == ""  # it reads all of them
    else:
        assert note.startswith(f"note: the text encoders do not read the end of long prompts such as '{PROMPT} a photo")
        assert ("raise --max-sequence-length" in note) == (name != "sd15")
        assert cut_note(family, ["dog"]) == ""


SLOW = ("hidream",)  # ten components to save and load


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in tiny_families.TINY]
)
def test_a_trained_adapter_makes_a_loaded_pipeline_the_trained_one(name: str, tmp_path: Path) -> None:
    """Two steps on captions of different lengths, with the pipeline as it is loaded from a folder."""
    tiny_families.TINY[name]().save_pretrained(tmp_path / "base")
    size, captions = SIZES.get(name, (16, 32)), ["a dog", PROMPT, "a photo"]

    def load() -> tuple[Family, Gallery]:
        family = load_family(str(tmp_path / "base"), ObjectiveOptions(), LENGTHS.get(name, 64))
        shown = beside(family, size) if family.takes else None
        sampler = Sampler(family, size, 2, nullcontext, steps=1, guidance=3.0, shown=shown)
        return family, Gallery(sampler, [PROMPT, "dog"], each=1, seed=1, text_trained=False)

    family, gallery = load()
    before = gallery.draw()
    adaptation = adapt(family, resolve(DreamBoothOptions(adapter=DreamBoothAdapterOptions(rank=4))))
    pixels, given = beside(family, size, 3)
    texts = Prompts(family, prompts(family, captions, given), False, at_once=1)
    loss = DiffusionLoss(family, {}, texts, 1.0, cached_latents=False)
    family.drop_text_encoders()
    optimizer = torch.optim.AdamW([parameter for _, parameter in adaptation.parameters()], lr=0.05)
    torch.manual_seed(0)
    batch = DiffusionBatch(
        inputs=pixels,
        given=given,
        captions=torch.arange(3),
        prior=torch.zeros(3, dtype=torch.bool),
        sizes=torch.tensor([[40, 30, 0, 0, *size]] * 3),
        masks=torch.ones(3, 1, 1, 1),
        seeds=torch.arange(3),
    )
    family.denoiser.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss(batch).backward()
        assert not adaptation.check_gradients()
        optimizer.step()
    adaptation.save(tmp_path / "adapter.safetensors")
    trained = gallery.draw()
    fresh, again = load()
    adaptation.load(fresh.pipe, tmp_path / "adapter.safetensors")
    assert largest_difference(again.draw(), trained) == 0
    assert largest_difference(before, trained) > 1e-3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLPipeline"),
        ("FluxControlPipeline", "FluxPipeline"),
        ("ZImageOmniPipeline", "ZImagePipeline"),
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        ("SanaSprintPipeline", "SanaPipeline"),
        ("AuraPipeline", "AuraFlowPipeline"),
    ],
)
def test_the_nearest_pipeline_is_named(given: str, expected: str) -> None:
    assert nearest(given) == expected
