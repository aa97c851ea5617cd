"""The loss of every family: the error of the prediction, for the subject and for prior preservation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.noise import Noise


class DiffusionLoss(nn.Module):
    """The mean weighted error on a batch, with a prior preservation term.

    L = mean(e over instance items) + prior_loss_weight * mean(e over prior items), where e is the weighted error of one
    item, averaged over its latents. Noise and noise levels of an item depend only on its seed. `parts` registers the
    trained components as submodules.
    """

    def __init__(
        self,
        family: Family,
        parts: Mapping[str, nn.Module],
        prompts: Prompts,
        prior_loss_weight: float,
        cached_latents: bool,
    ) -> None:
        super().__init__()
        self.family = family
        self.parts = nn.ModuleDict(parts)
        self.prompts = prompts
        self.prior_loss_weight = prior_loss_weight
        self.cached_latents = cached_latents
        self.predict = family.predict

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the prediction but not the noise, whose random numbers would differ, and not the captions."""
        self.predict = torch.compile(self.predict, *args, **kwargs)

    def forward(self, batch: DiffusionBatch) -> Tensor:
        """Return the loss of a batch, a scalar."""
        errors, prior = self.errors(batch), batch["prior"].to(self.family.device)
        loss = errors[~prior].mean()
        return loss + self.prior_loss_weight * errors[prior].mean() if prior.any() else loss

    def errors(self, batch: DiffusionBatch) -> Tensor:
        """Return the weighted error of each item (B,), float32."""
        family = self.family
        noise = Noise(len(batch["seeds"]), batch["seeds"].tolist())
        inputs = batch["inputs"].to(family.device)
        moments = inputs if self.cached_latents else family.moments(inputs)
        noised = family.objective(family.latents(moments, noise), noise)
        dtype = family.dtype
        prompt = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor  # not the masks of tokens
            for name, tensor in self.prompts(batch["captions"]).items()
        }
        if family.takes:
            given = batch["given"].to(family.device)
            prompt["condition"] = (given if self.cached_latents else family.condition(inputs, given)).to(dtype)
        sizes = batch["sizes"].to(family.device)
        answer = self.predict(noised.latents.to(dtype), noised.timesteps, prompt, sizes)
        errors = noised.errors(answer, family.options.loss_type)
        mask = nn.functional.interpolate(batch["masks"].to(family.device), errors.shape[-2:], mode="area")
        if errors.ndim == 5:  # of clips
            mask = mask.unsqueeze(2)
        return noised.weight.to(torch.float32) * (errors * mask).flatten(1).mean(1)
