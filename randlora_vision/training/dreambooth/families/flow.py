"""The base class of the families that are trained with flow matching."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from randlora_vision.training.dreambooth.families.base import Family
from randlora_vision.training.dreambooth.objectives import FlowMatching, Objective


class FlowFamily(Family):
    """A transformer that is trained with flow matching; the base class of such families."""

    denoiser_name = "transformer"
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ()
    loading: ClassVar[Mapping[str, Any]] = {}
    encoding: ClassVar[Mapping[str, Any]] = {}

    def make_objective(self) -> Objective:
        """Return the flow matching objective."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # a solver of the same straight lines
            config = scheduler.config
            if not (config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
                raise ValueError(
                    f"the scheduler of this {type(self.pipe).__name__} must be one of flow matching, but it is a "
                    f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r}"
                )
            scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, config.get("flow_shift", 1.0))
        return FlowMatching(scheduler, self.options, self.patch_area, self.boundary)

    @property
    def boundary(self) -> float | None:
        """The first timestep of the denoiser for high noise, if there is another one for low noise."""
        return None

    @property
    def patch_area(self) -> int:
        """How many places of the latents become one token."""
        return 4

    def guidance(self, count: int) -> Tensor | None:
        """Return the scales (B,) for a transformer with guidance distilled into it, else None."""
        config: Any = self.denoiser.config
        if not config.get("guidance_embeds"):
            return None
        return torch.full((count,), self.options.guidance_scale, device=self.device)
