"""The loss of every family: the squared error of the denoiser's answer, for the subject and for what is to be kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.families import Family


class DiffusionLoss(nn.Module):
    """Holds what is trained, and a few more parts, under `parts`; called with a batch it returns a scalar.

    L = mean over instance items of e + prior_loss_weight * mean over prior items of e, with e the
    weighted squared error of one item, mean over its latents. Noise and its level come from PyTorch's
    current random state.
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

    def forward(self, batch: DiffusionBatch) -> Tensor:
        """Return the loss."""
        errors, prior = self.errors(batch), batch["prior"].to(self.family.device)
        loss = errors[~prior].mean()
        return loss + self.prior_loss_weight * errors[prior].mean() if prior.any() else loss

    def errors(self, batch: DiffusionBatch) -> Tensor:
        """Return each item's weighted squared error (B,), float32."""
        family = self.family
        inputs = batch["inputs"].to(family.device)
        noised = family.objective(family.latents(inputs if self.cached_latents else family.moments(inputs)))
        dtype = next(family.denoiser.parameters()).dtype
        prompt = {name: tensor.to(dtype) for name, tensor in self.prompts(batch["captions"]).items()}
        sizes = batch["sizes"].to(family.device)
        answer = family.predict(noised.latents.to(dtype), noised.timesteps, prompt, sizes)
        squared = (answer.float() - noised.target).square().flatten(1).mean(1)
        return noised.weight.to(torch.float32) * squared
