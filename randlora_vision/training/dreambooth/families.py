"""The families of diffusion pipelines: one small class per family with everything that differs in training.

Prompts are encoded by `encode_prompt` of the pipeline, so training and sampling use the same encodings. Latents are
always unpacked here, (B, C, H, W); a family whose denoiser needs packed latents packs them internally.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.training.dreambooth.conditioning import check_conditioning
from randlora_vision.training.dreambooth.noise import Noise
from randlora_vision.training.dreambooth.objectives import (
    FlowMatching,
    NoisePrediction,
    Objective,
    ObjectiveOptions,
    scheduler_for,
)

Encoded = dict[str, Tensor]  # keys are argument names of the pipeline


class Family:
    """Stable Diffusion 1.5 and 2, and the base class of the other families."""

    pipeline = "StableDiffusionPipeline"
    denoiser_name = "unet"
    text_encoder_names: tuple[str, ...] = ("text_encoder",)  # all of them
    trainable_text_encoders: tuple[str, ...] = ("text_encoder",)  # the CLIP ones
    loading: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    """Loading arguments that override what the pipeline was saved with."""
    additions: tuple[str, ...] = ()
    """Values of the denoiser's `addition_embed_type` for which `predict` passes the inputs."""
    packing = 1
    """How many latents the denoiser takes as one."""

    def __init__(self, pipe: Any, options: ObjectiveOptions, max_sequence_length: int | None) -> None:
        self.pipe = pipe
        self.options = options
        self.max_sequence_length = max_sequence_length
        check_conditioning(self.denoiser, pipe, self.additions, self.packing)
        pipe.scheduler = scheduler_for(pipe.scheduler, options)
        self.objective = self.make_objective()

    def make_objective(self) -> Objective:
        """Return the training objective of this family."""
        return NoisePrediction(self.pipe.scheduler, self.options)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at every sampling step."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def size_multiple(self) -> int:
        """The number of pixels by which both sides of an image must be divisible."""
        return int(self.pipe.vae_scale_factor)

    @property
    def default_resolution(self) -> int:
        """The default side length of generated images, in pixels."""
        latents = getattr(self.pipe, "default_sample_size", None) or self.pipe.unet.config.sample_size
        return int(latents) * int(self.pipe.vae_scale_factor)

    def drop_text_encoders(self) -> None:
        """Remove the text encoders from the pipeline, once all needed prompts are encoded."""
        for name in self.text_encoder_names:
            setattr(self.pipe, name, None)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode B prompts; if `guided`, also return the encoding of the empty prompt."""
        found, negative = self.pipe.encode_prompt(list(prompts), self.device, 1, guided)
        return _present(prompt_embeds=found, negative_prompt_embeds=negative)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the denoiser; `sizes` (B, 6) holds original size, crop corner and size after cropping, height first."""
        return self.denoiser(latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"]).sample

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log variance of the latents (B, 2 C, H, W) of images (B, 3, h, w) between -1 and 1."""
        with _full_precision(self.device):
            moments: Tensor = self.pipe.vae.encode(pixels.to(self.device, torch.float32)).latent_dist.parameters
            return moments.contiguous()  # sampling with randn_like depends on the memory layout

    def latents(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        """Draw latents (B, C, H, W) from their distribution, scaled for the denoiser."""
        mean, log_variance = moments.chunk(2, dim=1)
        noise = noise or Noise(len(moments))
        drawn = mean + (log_variance.clamp(-30, 20) / 2).exp() * noise.normal(mean.shape[1:], mean.device)
        return (drawn - self._shift) * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, h, w) between 0 and 1, float32."""
        with _full_precision(self.device):
            scaled = latents.float() / self.pipe.vae.config.scaling_factor + self._shift
            return self.pipe.image_processor.postprocess(
                self.pipe.vae.decode(scaled, return_dict=False)[0], output_type="pt"
            )

    @property
    def _shift(self) -> float:
        return getattr(self.pipe.vae.config, "shift_factor", None) or 0.0

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return latents that the pipeline outputs as (B, C, H, W)."""
        return latents


class SDXL(Family):
    """Stable Diffusion XL: two text encoders, and conditioning on image sizes."""

    pipeline = "StableDiffusionXLPipeline"
    text_encoder_names = trainable_text_encoders = ("text_encoder", "text_encoder_2")
    loading: Mapping[str, Any] = {}
    additions = ("text_time",)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Also return the pooled encodings."""
        return _four(
            self.pipe.encode_prompt(prompt=list(prompts), device=self.device, do_classifier_free_guidance=guided)
        )

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Also condition on the pooled encoding and the sizes."""
        added = {"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": sizes.to(latents.dtype)}
        return self.denoiser(
            latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"], added_cond_kwargs=added
        ).sample


class SD3(Family):
    """Stable Diffusion 3 and 3.5: flow matching, two CLIP text encoders and a T5 one, which may be missing."""

    pipeline = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    loading: Mapping[str, Any] = {}

    def make_objective(self) -> Objective:
        """Return the flow matching objective."""
        return FlowMatching(self.pipe.scheduler, self.options)

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and the patches of the transformer."""
        return int(self.pipe.vae_scale_factor) * int(self.pipe.patch_size)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with all text encoders."""
        length = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        texts = list(prompts)
        return _four(
            self.pipe.encode_prompt(
                texts, texts, texts, device=self.device, do_classifier_free_guidance=guided, **length
            )
        )

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the transformer."""
        return self.denoiser(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
        ).sample


class Flux(Family):
    """Flux.1: flow matching on packed latents, one CLIP text encoder (pooled) and a T5 one."""

    pipeline = "FluxPipeline"
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder",)
    loading: Mapping[str, Any] = {}
    packing = 4

    def make_objective(self) -> Objective:
        """Return the flow matching objective."""
        return FlowMatching(self.pipe.scheduler, self.options)

    @property
    def size_multiple(self) -> int:
        """The multiple for the VAE and latents packed two by two."""
        return 2 * int(self.pipe.vae_scale_factor)

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode with both text encoders; Flux has built-in guidance and needs no negative prompt."""
        length = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        found, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.device, **length)
        return {"prompt_embeds": found, "pooled_prompt_embeds": pooled}

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Pack the latents, call the transformer and unpack its output."""
        count, channels, height, width = latents.shape
        text = prompt["prompt_embeds"]
        guidance = None
        if self.denoiser.config.guidance_embeds:  # type: ignore[union-attr]
            guidance = torch.full((count,), self.options.guidance_scale, device=latents.device)
        answer = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents, count, channels, height, width),
            timestep=timesteps / 1000,  # the transformer multiplies them by 1000
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=prompt["pooled_prompt_embeds"],
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=text.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, text.dtype),
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.unpack(answer, height * scale, width * scale)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo the packing of the pipeline; height and width are those of the image."""
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked


FAMILIES = {family.pipeline: family for family in (Family, SDXL, SD3, Flux)}


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
        raise ValueError(f"{path} is a {name}, which cannot be trained; supported pipelines: {', '.join(FAMILIES)}")
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


def _four(encoded: Sequence[Tensor | None]) -> Encoded:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return _present(**dict(zip(names, encoded, strict=True)))


def _present(**tensors: Tensor | None) -> Encoded:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, because VAEs overflow in fp16."""
    with torch.autocast(device.type, enabled=False):
        yield
