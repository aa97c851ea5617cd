"""A learning rate from the size of the first steps, relative to the weights that are adapted.

Shapes: O out, I in, R rank, N bases, m narrow side.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor, nn

from randlora_vision.compute.functional import effective_weight
from randlora_vision.injection.record import unwrap
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules
from randlora_vision.layers.state import ParameterState

RELATIVE_STEP = 0.02
_LAYERS = 16  # the median over more does not differ
_SEED = 0


@torch.no_grad()
def suggest_lr(model: nn.Module, relative_step: float = RELATIVE_STEP, adapter_name: str = "default") -> float:
    r"""Return the Adam learning rate at which one step changes an adapted weight by `relative_step` of its norm.

    Adam's first steps move every number by the learning rate, whatever the gradient's size, so after the first step
    the tensor that starts at zero (lambda, or gamma with ``init="gamma-zero"``) is a matrix of signs times the rate,
    and the update of a weight has the norm lr * ||dW(signs)||. Hence

    .. math:: lr = c \, / \, \mathrm{median}_{layers} \frac{\|\Delta W(\pm 1)\|_F}{\|W\|_F}

    with c = `relative_step`. The rule accounts for alpha, rank, initialisation, the kind of bases and the scale of the
    model's weights. It is for Adam, AdamW and other optimisers whose steps do not depend on the gradient's size.

    Args:
        model: A model with the adapter, as `inject` leaves it.
        relative_step: The change of a weight per step, relative to its Frobenius norm.
        adapter_name: Name of the adapter.

    Returns:
        The peak learning rate, for use with a warmup.

    Raises:
        ValueError: If there is no such adapter, or none of its weights is a dense one that is not zero.
    """
    places = [found for found in adapted_modules(unwrap(model)) if adapter_name in found[3].slots]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no adapter {adapter_name!r}")
    chosen = places[:: max(1, len(places) // _LAYERS)]
    ratios = [ratio for _, module, param, state in chosen if (ratio := _ratio(module, param, state, adapter_name))]
    if not ratios:
        raise ValueError(
            f"the weights under adapter {adapter_name!r} are quantised, offloaded or zero: they give no rate"
        )
    return relative_step / median(ratios)


def _ratio(module: AdaptedModule, param: str, state: ParameterState, adapter_name: str) -> float:
    """Return ||dW(signs)|| / ||W|| for one weight; 0 for a quantised one, or one that is zero."""
    weight = module.base_weight(param)
    if module.has_packed_weight or weight.is_meta:
        return 0.0
    norm = float(torch.linalg.vector_norm(weight.float()))
    if norm == 0:
        return 0.0
    lam, gamma = (tensor.detach() for tensor in module.adapter_tensors(param, adapter_name))
    lam, gamma = (_signs(lam), gamma) if gamma.any() else (lam, _signs(gamma))
    slot = state.slots[adapter_name]
    wide = max(state.out_features, state.in_features)
    term = slot.bases.term(lam.float(), gamma.float(), wide, slot.factor(1.0), torch.float32)
    update = effective_weight(torch.zeros(state.out_features, state.in_features, device=lam.device), (term,))
    return float(torch.linalg.vector_norm(update)) / norm


def _signs(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return (2.0 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like.device)
