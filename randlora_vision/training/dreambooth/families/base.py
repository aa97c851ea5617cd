"""The base class of the families, which is the family of Stable Diffusion 1.5 and 2.

Prompts are encoded by `encode_prompt` of the pipeline, so training and sampling use the same encodings. Latents are
always unpacked here, (B, C, H, W), or (B, C, F, H, W) in families of videos; a family whose denoiser needs packed
latents packs them internally.
"""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.conditioning import check_conditioning
from randlora_vision.training.dreambooth.families.components import Components
from randlora_vision.training.dreambooth.families.precision import full_precision
from randlora_vision.training.dreambooth.noise import Noise
from randlora_vision.training.dreambooth.objectives import (
    NoisePrediction,
    Objective,
    ObjectiveOptions,
    scheduler_for,
)

Encoded = dict[str, Tensor]  # keys are argument names of the pipeline
Takes = Literal["mask", "image", "images"] | None

POOLED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
# What both `encode_prompt` and the call of a pipeline take; their defaults may differ, and the call decides.
_TEXT_OPTIONS = ("max_sequence_length", "clean_caption", "complex_human_instruction", "text_encoder_out_layers")


class Family(Components):
    """Stable Diffusion 1.5 and 2, and the base class of the other families."""

    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    registered: ClassVar[dict[str, type["Family"]]] = {}
    """Every family by the class name of its pipeline."""
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)  # the CLIP ones
    additions: ClassVar[tuple[str, ...]] = ()
    """Values of the denoiser's `addition_embed_type` for which `predict` passes the inputs."""
    encodings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    """The arguments of the pipeline that its `encode_prompt` returns, in order."""
    encoding: ClassVar[Mapping[str, Any]] = {"num_images_per_prompt": 1}
    """Further arguments that `encode_prompt` needs."""
    packing: ClassVar[int] = 1
    """How many latents the denoiser takes as one."""
    normalised: ClassVar[bool] = False
    """Whether `normalise` applies `latents_mean` and `latents_std` of the VAE."""
    learned_variance: ClassVar[bool] = False
    """Whether the denoiser may predict a variance too, which is not trained."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline that is the scale of classifier-free guidance, or of built-in guidance."""
    sampling: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline when it samples."""
    takes: ClassVar[Takes] = None
    """What the denoiser is given beside the text: the image around a mask, the image to edit, or several images."""
    sees: ClassVar[bool] = False
    """Whether the text encoder sees the images to edit: prompts are `Seen` then."""
    one_at_a_time: ClassVar[bool] = False
    """Whether the pipeline makes one picture per call."""

    def __init_subclass__(cls) -> None:
        if "pipeline" in vars(cls):
            Family.registered[cls.pipeline] = cls

    frame_rate: float | None = None
    """The frames per second of clips; None for families that make images alone."""
    frames_per_latent: int = 1
    """How many frames become one in the latents of a clip, after the first frame."""

    def __init__(self, pipe: Any, options: ObjectiveOptions, max_sequence_length: int | None) -> None:
        super().__init__(pipe)
        self.num_frames = 1
        """The number of frames of what is generated."""
        self.options = options
        self.max_sequence_length = max_sequence_length
        if options.expert is not None and len(self.denoisers) == 1:
            raise ValueError(f"--expert is for a pipeline with two denoisers, but this {self.pipeline} has one")
        self.prepare_denoiser()
        check_conditioning(self)
        pipe.scheduler = scheduler_for(pipe.scheduler, options)
        self.objective = self.make_objective()

    def make_objective(self) -> Objective:
        """Return the training objective of this family."""
        return NoisePrediction(self.pipe.scheduler, self.options)

    @classmethod
    def quantized_texts(cls, present: Collection[str]) -> list[str]:
        """Return those of the components that are quantised with the denoiser: text encoders that cannot be trained."""
        return [name for name in cls.text_encoder_names if name in present and name not in cls.trainable_text_encoders]

    @property
    def latent_channels(self) -> int:
        """The number of channels of the latents of the VAE."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def condition_channels(self) -> int:
        """The number of channels that `condition` adds to the latents in the input of the denoiser."""
        return 0

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The modules of the denoiser whose output nothing uses: no gradient would reach their adapters."""
        return ()

    @property
    def size_multiple(self) -> int:
        """The number of pixels by which both sides of an image must be divisible: a patch, or latents packed as one."""
        config: Any = self.denoiser.config
        return int(self.pipe.vae_scale_factor) * max(int(config.get("patch_size", 1)), math.isqrt(self.packing))

    @property
    def default_resolution(self) -> int:
        """The default side length of generated images, in pixels."""
        config: Any = self.denoiser.config
        latents = getattr(self.pipe, "default_sample_size", None) or config.sample_size
        return int(latents) * int(self.pipe.vae_scale_factor)

    @property
    def text_options(self) -> dict[str, Any]:
        """The arguments of `encode_prompt` with which the call of the pipeline encodes its prompts."""
        encoding = inspect.signature(self.pipe.encode_prompt).parameters
        calling = inspect.signature(type(self.pipe).__call__).parameters
        found = {name: calling[name].default for name in _TEXT_OPTIONS if name in encoding and name in calling}
        if self.max_sequence_length is not None and "max_sequence_length" in encoding:
            found["max_sequence_length"] = self.max_sequence_length
        return found

    def encode(self, prompts: Sequence[str], guided: bool = False) -> Encoded:
        """Encode B prompts; if `guided`, also return the encoding of the empty prompt."""
        options = {"device": self.device, "do_classifier_free_guidance": guided, **self.encoding, **self.text_options}
        return named(self.encodings, self.pipe.encode_prompt(list(prompts), **options))

    def predict(self, latents: Tensor, timesteps: Tensor, prompt: Encoded, sizes: Tensor) -> Tensor:
        """Call the denoiser.

        Args:
            latents: Noisy latents (B, C, H, W).
            timesteps: The scheduler's timesteps (B,), from 0 to 1000, which is noise.
            prompt: The encodings of B prompts, and the `condition` of a family that takes one.
            sizes: Original size, crop corner and size after cropping (B, 6), height first.

        Returns:
            The prediction (B, C, H, W) that the pipeline gives to its scheduler.
        """
        return self.denoiser(latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"]).sample

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log variance of the latents (B, 2 C, H, W) of images (B, 3, h, w) between -1 and 1."""
        with full_precision(self.device):
            moments: Tensor = self.pipe.vae.encode(pixels.to(self.device, torch.float32)).latent_dist.parameters
            return moments.contiguous()  # sampling with randn_like depends on the memory layout

    def latents(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        """Draw latents (B, C, H, W) from their distribution, scaled for the denoiser."""
        mean, log_variance = moments.chunk(2, dim=1)
        noise = noise or Noise(len(moments))
        drawn = mean + (log_variance.clamp(-30, 20) / 2).exp() * noise.normal(mean.shape[1:], mean.device)
        return self.normalise(drawn)

    def mean_latents(self, pixels: Tensor) -> Tensor:
        """Return the means of the latents (B, C, H, W) of images (B, 3, h, w), scaled for the denoiser."""
        return self.normalise(self.moments(pixels).chunk(2, dim=1)[0])

    def condition(self, pixels: Tensor, given: Tensor) -> Tensor:
        """Return what `predict` gets beside the latents (B, c, H, W), if the family `takes` something.

        Args:
            pixels: The images (B, 3, h, w), between -1 and 1.
            given: Their masks (B, 1, h, w), 1 where the image is made anew, or the images to edit (B, 3, h, w), or N
                of them (B, N, 3, h, w). By default their latents are returned.
        """
        return self.mean_latents(given)

    def shown(self, pixels: Tensor, given: Tensor) -> dict[str, Any]:
        """Return the arguments of the pipeline that make it sample with this `condition`."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, h, w) between 0 and 1, float32."""
        with full_precision(self.device):
            pixels = self.decode_raw(self.denormalise(latents.float()))
            return self.pipe.image_processor.postprocess(pixels, output_type="pt")

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, h, w) of latents as the VAE has them."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents of the VAE as the denoiser takes them."""
        return (latents - self._shift) * self.pipe.vae.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        return latents / self.pipe.vae.config.scaling_factor + self._shift

    @property
    def _shift(self) -> float:
        return getattr(self.pipe.vae.config, "shift_factor", None) or 0.0

    def generate(self, pipe: Any, encoded: Encoded, height: int, width: int, **settings: Any) -> Tensor:
        """Sample from a pipeline like `self.pipe`; return latents (B, C, H, W)."""
        if "guidance_scale" in settings:
            settings[self.guidance_argument] = settings.pop("guidance_scale")
        size = {"height": height, "width": width, "output_type": "latent"}
        answer = pipe(**self.arguments(encoded), **{**self.sampling, **settings}, **size)
        return self.sampled(answer[0], height, width)

    def sampled(self, output: Tensor, height: int, width: int) -> Tensor:
        """Return the output of the pipeline as latents."""
        return self.unpack(output, height, width)

    def arguments(self, encoded: Encoded) -> dict[str, Any]:
        """Return encoded prompts as arguments of the pipeline."""
        return dict(encoded)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return latents that the denoiser takes as (B, C, H, W); height and width are those of the image."""
        return latents


Family.registered[Family.pipeline] = Family


def named(names: Sequence[str], tensors: Sequence[Tensor | None]) -> Encoded:
    """Return what `encode_prompt` returned under the argument names of the pipeline, without what is None."""
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
