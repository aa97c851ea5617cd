"""A learning rate from the size of the first steps, relative to the features that they change or to the weights.

Shapes: O out, I in, R rank, N bases, m narrow side, B samples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median

import torch
from torch import Tensor, nn

from randlora_vision.compute.functional import effective_weight
from randlora_vision.injection.record import unwrap
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules
from randlora_vision.layers.state import ParameterState

RELATIVE_STEP = 0.02
FEATURE_STEP = 0.12
_LAYERS = 16  # the median over more does not differ
_SEED = 0
_START = 1e-4  # where no weight gives a rate to begin with
_ROUNDS = 8
_NEAR = 0.05
_FAR = 2.0  # beyond it the features jump: draws of signs differ by less
_EQUAL = 1e-5  # relative to the features: what rounding makes of equal ones
_DRAWS = 4  # of signs: by one of them the rate moves by a quarter

Features = Callable[[], Tensor | Sequence[Tensor]]
Place = tuple[AdaptedModule, str, ParameterState]


@torch.no_grad()
def suggest_lr(
    model: nn.Module,
    relative_step: float | None = None,
    adapter_name: str = "default",
    *,
    features: Features | None = None,
) -> float:
    r"""Return the Adam learning rate at which one step changes the model by `relative_step`.

    Adam's first steps move every number by the learning rate, whatever the gradient's size, so after the first step
    the tensor that starts at zero (lambda, or gamma with ``init="gamma-zero"``) is a matrix of signs times the rate.
    The rule sets random signs. With `features` f of B samples, the rate is the one at which they change the features
    by the part c = `relative_step` of their spread, in the root mean square over four draws of signs,

    .. math:: \sqrt{\mathrm{mean}_{signs} \sum_b \|f_b(lr) - f_b(0)\|^2} = c \sqrt{\sum_b \|f_b(0) - \bar f(0)\|^2}

    The rule accounts for alpha, rank, initialisation, the kind of bases, and for how sensitive the model is: its depth
    and width, the scale of its weights and residuals, and the differences between the samples. Without `features`, the
    change of a weight is compared with the weight,

    .. math:: lr = c \, / \, \mathrm{median}_{layers} \frac{\|\Delta W(\pm 1)\|_F}{\|W\|_F}

    which needs no data, but does not see how a change of the weights adds up in the features. In both cases, the rate
    is at most the root mean square of the other factor, which moves by it too: a small alpha would otherwise give a
    rate at which that factor is lost in a few steps. The rules are for Adam, AdamW and other optimisers whose steps do
    not depend on the gradient's size.

    Args:
        model: A model with the adapter, as `inject` leaves it.
        relative_step: The change per step: of the features relative to their spread, 0.12 by default; without
            `features`, of a weight relative to its Frobenius norm, 0.02 by default.
        adapter_name: Name of the adapter.
        features: Calls the model on a batch of different samples and returns its features, a tensor (B, ...), or
            several, such as those of two towers, of which the one that changes most counts. It is called five
            to thirteen times, in eval mode and without gradients.

    Returns:
        The peak learning rate, for use with a warmup.

    Raises:
        ValueError: If there is no such adapter, none of its weights is a dense one that is not zero (without
            `features`), or the features do not differ between the samples, do not depend on the adapter, or jump.
    """
    places = [
        (found[1], found[2], found[3]) for found in adapted_modules(unwrap(model)) if adapter_name in found[3].slots
    ]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no adapter {adapter_name!r}")
    if features is not None:
        wanted = FEATURE_STEP if relative_step is None else relative_step
        rate: float | None = _features_rate(model, places, adapter_name, features, wanted)
    else:
        rate = _weights_rate(places, adapter_name, RELATIVE_STEP if relative_step is None else relative_step)
    if rate is None:
        raise ValueError(
            f"the weights under adapter {adapter_name!r} are quantised, offloaded or zero: they give no rate"
        )
    others = (_factors(*place, adapter_name)[1] for place in places)
    return min(rate, median(float(other.float().square().mean().sqrt()) for other in others))


def _features_rate(
    model: nn.Module, places: Sequence[Place], adapter_name: str, features: Features, wanted: float
) -> float:
    """Return the rate at which random signs change the features by the part `wanted` of their spread."""
    generator = torch.Generator().manual_seed(_SEED)
    starts = [_factors(*place, adapter_name)[0] for place in places]
    with _eval_mode(model), _restored(starts) as before:
        at_first = _parts(features())
        spreads = [float(torch.linalg.vector_norm(part - part.mean(0))) for part in at_first]
        sizes = [float(torch.linalg.vector_norm(part)) for part in at_first]
        if not all(_EQUAL * size < spread < math.inf for size, spread in zip(sizes, spreads, strict=True)):
            raise ValueError(
                f"the features of the {len(at_first[0])} samples are all equal, or not finite: they give no rate"
            )

        def draw() -> list[Tensor]:
            return [_signs(tensor, generator) for tensor in starts]

        def change(lr: float, signs: Sequence[Tensor]) -> float:
            for tensor, value, sign in zip(starts, before, signs, strict=True):
                tensor.copy_(value + lr * sign)
            changed = zip(_parts(features()), at_first, spreads, strict=True)
            return max(float(torch.linalg.vector_norm(now - then)) / spread for now, then, spread in changed)

        lr, signs = _weights_rate(places, adapter_name, RELATIVE_STEP / 2) or _START, draw()
        for _ in range(_ROUNDS):
            first = change(lr, signs)
            if first == 0:
                raise ValueError(
                    f"the features do not depend on the adapter {adapter_name!r}: they give no learning rate"
                )
            if abs(first / wanted - 1) < _NEAR:
                break
            lr *= min(max(wanted / first, 0.01), 100.0) if math.isfinite(first) else 0.01
        else:
            first = change(lr, signs)
        others = [change(lr, draw()) for _ in range(_DRAWS - 1)]
        found = math.sqrt(fmean(c * c for c in [first, *others]))
        if not 1 / _FAR < found / wanted < _FAR:
            raise ValueError(
                f"no rate was found that changes the features by {wanted:.1%} of their spread (at {lr:.1e} it is "
                f"{found:.1%}): they jump with the adapter's weights"
            )
    return lr * wanted / found


def _parts(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [part.float() for part in ([features] if isinstance(features, Tensor) else features)]


def _factors(module: AdaptedModule, param: str, state: ParameterState, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return lambda and gamma of one weight, the one that starts at zero first."""
    lam, gamma = module.adapter_tensors(param, adapter_name)
    return (lam, gamma) if gamma.any() else (gamma, lam)


def _weights_rate(places: Sequence[Place], adapter_name: str, step: float) -> float | None:
    """Return the rate at which random signs change the median weight by the part `step`; None if none gives one."""
    chosen = places[:: max(1, len(places) // _LAYERS)]
    ratios = [ratio for module, param, state in chosen if (ratio := _ratio(module, param, state, adapter_name))]
    return step / median(ratios) if ratios else None


@contextlib.contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of the tensors; on leaving the context, give the tensors these values again."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield before
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; on leaving the context, every module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ratio(module: AdaptedModule, param: str, state: ParameterState, adapter_name: str) -> float:
    """Return ||dW(signs)|| / ||W|| for one weight; 0 for a quantised one, or one that is zero."""
    weight = module.base_weight(param)
    if module.has_packed_weight or weight.is_meta:
        return 0.0
    norm = float(torch.linalg.vector_norm(weight.float()))
    if norm == 0:
        return 0.0
    lam, gamma = (tensor.detach() for tensor in module.adapter_tensors(param, adapter_name))
    generator = torch.Generator().manual_seed(_SEED)
    lam, gamma = (_signs(lam, generator), gamma) if gamma.any() else (lam, _signs(gamma, generator))
    slot = state.slots[adapter_name]
    wide = max(state.out_features, state.in_features)
    term = slot.bases.term(lam.float(), gamma.float(), wide, slot.factor(1.0), torch.float32)
    update = effective_weight(torch.zeros(state.out_features, state.in_features, device=lam.device), (term,))
    return float(torch.linalg.vector_norm(update)) / norm


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2.0 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like.device)
