"""The components of a pipeline: which of them are denoisers, and when they are loaded, moved and let go."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from randlora_vision.training.dreambooth.offload import Place, offload


class Components:
    """The components of a pipeline that is trained; the base class of `Family`.

    Raises ValueError if the pipeline lacks a denoiser.
    """

    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)  # all of them
    loading: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    """Loading arguments that override what the pipeline was saved with."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.denoisers_later: dict[str, Callable[[], nn.Module]] = {}
        self.offload_to: Place | None = None
        if absent := [name for name in self.denoisers_in(pipe.config) if getattr(pipe, name, None) is None]:
            raise ValueError(f"this {type(pipe).__name__} has no {absent[0]}, which it needs for training")

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at every sampling step, or the first of those that take turns."""
        return getattr(self.pipe, self.denoiser_name)

    @classmethod
    def denoisers_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the components that are denoisers in a pipeline of this configuration, the noisiest steps' first."""
        return (cls.denoiser_name,)

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """All denoisers by their names."""
        return {name: getattr(self.pipe, name) for name in self.denoisers_in(self.pipe.config)}

    @property
    def trained_denoisers(self) -> tuple[str, ...]:
        """The names of the denoisers that are trained."""
        return self.denoisers_in(self.pipe.config)

    @property
    def device(self) -> torch.device:
        """The device on which the pipeline computes, even while the denoiser is elsewhere."""
        return next(self.pipe.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the denoiser computes."""
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())  # not of packed weights

    def prepare_denoiser(self) -> None:
        """Change what training needs otherwise in a denoiser, when it is made and when its weights are loaded."""

    def load_denoiser(self) -> None:
        """Load the weights of the denoisers, if `load_family` left them out."""
        if self.denoisers_later:
            for name, load in self.denoisers_later.items():
                setattr(self.pipe, name, load())
            self.denoisers_later = {}
            self.prepare_denoiser()
            if self.offload_to is None:
                self.pipe.to(self.device)

    def offload(self) -> None:
        """Offload the denoisers, if the options say so."""
        if self.offload_to is not None:
            for denoiser in self.denoisers.values():
                offload(denoiser, self.offload_to, self.device)

    def release(self) -> None:
        """Free the memory of the device, when the pipeline is no longer needed."""
        if self.offload_to is None:
            self.pipe.to("cpu")

    def like(self, **parts: Any) -> Any:
        """Return a pipeline of the same components and settings, except those given, for sampling."""
        cls = type(self.pipe)
        settings = {
            name: self.pipe.config[name] for name in cls._get_signature_keys(cls)[1] if name in self.pipe.config
        }
        if self.offload_to is not None:  # the device of its weights is not where it computes
            cls = type(cls.__name__, (cls,), {"_execution_device": self.device})
        return cls(**{**self.pipe.components, **settings, **parts, **self.loading})

    def move(self, device: torch.device) -> None:
        """Move the pipeline to a device, except denoisers without weights."""
        empty = {name: getattr(self.pipe, name) for name in self.denoisers_later}
        for name in empty:
            setattr(self.pipe, name, None)
        self.pipe.to(device)
        for name, denoiser in empty.items():
            setattr(self.pipe, name, denoiser)

    def drop_text_encoders(self) -> None:
        """Remove the text encoders from the pipeline, once all needed prompts are encoded."""
        for name in self.text_encoder_names:
            setattr(self.pipe, name, None)
