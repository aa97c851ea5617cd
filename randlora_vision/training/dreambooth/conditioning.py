"""Refuses denoisers that sampling conditions on something that training would not give."""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import nn

_ATTACHED = ("encoder_hid_proj", "image_proj")  # where IP-Adapters project their images


class Conditioned(Protocol):
    """What is checked of a family."""

    pipe: Any
    additions: ClassVar[tuple[str, ...]]
    packing: ClassVar[int]
    normalised: ClassVar[bool]
    learned_variance: ClassVar[bool]

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer of the pipeline."""

    @property
    def latent_channels(self) -> int:
        """The number of channels of the latents of the VAE."""

    @property
    def condition_channels(self) -> int:
        """The number of channels that are given beside the latents."""


def check_conditioning(family: Conditioned) -> None:
    """Raise ValueError if the denoiser has an input that the training of its family does not provide."""
    for problem in _problems(family):
        raise ValueError(f"the {type(family.denoiser).__name__} of this pipeline cannot be trained: {problem}")


def _problems(family: Conditioned) -> Iterator[str]:
    denoiser: Any = family.denoiser
    pipe, additions, channels = family.pipe, family.additions, family.packing * family.latent_channels
    config = denoiser.config
    taken = channels + family.packing * family.condition_channels
    beside = " and the mask with the image around it" if family.condition_channels else ""
    if config.get("time_cond_proj_dim") is not None:
        yield (
            f"the guidance scale is an input (time_cond_proj_dim={config.time_cond_proj_dim}), as in latent "
            "consistency models, which are distilled and not trained to predict noise; train the adapter on the model "
            "that this one was distilled from, and load it into this one"
        )
    if family.condition_channels and config.in_channels == channels:
        yield "it takes no mask, only latents; load it in the pipeline that makes images from text alone"
    elif config.in_channels != taken:
        yield (
            f"it takes {config.in_channels} channels, but the latents{beside} have {taken}; the others hold a mask, an "
            "image or a control (inpainting, editing, upscaling, control models), which training does not provide"
        )
    predicted = (None, channels, family.latent_channels, *((2 * channels,) if family.learned_variance else ()))
    if config.get("out_channels") not in predicted:
        yield f"it predicts {config.out_channels} channels, but the latents have {channels} (a learned variance?)"
    for name in ("num_class_embeds", "class_embed_type"):
        if config.get(name) is not None:
            yield f"it needs class labels or noise levels ({name}={config[name]!r}), which training does not provide"
    if config.get("addition_embed_type") not in (None, "text", *additions):
        yield (
            f"it needs inputs for addition_embed_type={config.addition_embed_type!r}, which training does not provide; "
            f"{type(pipe).__name__} can be trained with: {', '.join(additions) or 'none'}"
        )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        yield _images(f"encoder_hid_dim_type={config.encoder_hid_dim_type!r}")
    elif config.get("encoder_hid_dim_type") is None:
        yield from (_images(name) for name in _ATTACHED if getattr(denoiser, name, None) is not None)
    yield from _time_ids(config, pipe)
    if not family.normalised and getattr(pipe.vae.config, "latents_mean", None) is not None:
        yield "its VAE normalises latents by latents_mean and latents_std, which training does not apply"


def _images(where: str) -> str:
    return f"it needs image embeddings ({where}), which training does not provide; call unload_ip_adapter first"


def _time_ids(config: Any, pipe: Any) -> Iterator[str]:
    if config.get("addition_embed_type") == "text_time" and getattr(pipe, "text_encoder_2", None) is not None:
        pooled = pipe.text_encoder_2.config.projection_dim
        ids, rest = divmod(config.projection_class_embeddings_input_dim - pooled, config.addition_time_embed_dim)
        if (ids, rest) != (6, 0):
            yield (
                f"it takes {ids} numbers beside the text, but training provides 6: original size, crop and target size "
                "(a refiner takes 5, with an aesthetic score)"
            )
