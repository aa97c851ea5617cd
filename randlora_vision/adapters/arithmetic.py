"""Sums of adapters: scaling, adding, weighting and negating (task vectors).

Shapes: R rank, N bases, m narrow side.

    delta W = s * sum_n B_n diag(lambda_n) A diag(gamma_n)

is linear in lambda and linear in gamma, but not in both together. Hence, for adapters with the same bases:

- ``w * delta`` is one adapter: lambda becomes ``w * lambda``. With w = -1 this is the negation.
- ``w1 * delta1 + w2 * delta2`` is one adapter if the gammas are equal (the lambdas add up), or if the lambdas are
  equal (the gammas add up). This is decided separately for each weight.
- Otherwise no adapter of this shape equals the sum, and nothing is approximated: keep the adapters active together
  (`set_weights`), which is exact for any bases, ranks and targets, and `merge` puts that sum into the weights.

Modules trained in full are summed as ``base + sum of w * (trained - base)``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision.adapters.checkpoint import install, own_adapter, plan_for, target_file
from randlora_vision.bases import BasesSpec, get_bases
from randlora_vision.bases.stored import StoredBases
from randlora_vision.checksums import CRC32
from randlora_vision.errors import printable_errors
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.claims import bases_of
from randlora_vision.files.untrusted import check_finite_pairs
from randlora_vision.injection.control import set_active, set_scale
from randlora_vision.injection.record import own_record, unwrap
from randlora_vision.names import listing
from randlora_vision.report import InjectionReport

_WINDOWS = ("uniform", "normal", "sparse", "structured")
"""Kinds whose values for one weight do not depend on the sizes of the other weights."""


def set_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters active, so that the model uses the weighted sum of their updates.

    This is exact for any adapters. Negative weights subtract; `merge` puts the sum into the model's weights. Modules
    trained in full are not weighted: those of the last named adapter are used.

    Raises:
        ValueError: If `weights` is empty, a weight is not a finite number, or an adapter does not exist or is merged.
    """
    _check_weights(weights)
    set_active(model, tuple(weights))
    for name, weight in weights.items():
        set_scale(model, weight, name)


@printable_errors
def weighted_sum(model: nn.Module, weights: Mapping[str, float], adapter_name: str) -> InjectionReport:
    """Add one new adapter that is the weighted sum of others, and make it the only active one.

    ``{"a": 2}`` scales, ``{"a": -1}`` negates, ``{"a": 1, "b": 1}`` adds. The sum is exact up to rounding; run-time
    scales are ignored.

    Args:
        model: The module that `inject` was called on.
        weights: Adapter name -> weight.
        adapter_name: The name of the sum. Its configuration is that of the first adapter.

    Returns:
        What was adapted.

    Raises:
        ValueError: If no single adapter equals the sum (see `randlora_vision.adapters.arithmetic`) because the bases,
            ranks or targets differ, or lambda and gamma both differ. The model is then left unchanged.
    """
    _check_weights(weights)
    model = unwrap(model)
    contents = {name: _content(model, name) for name in weights}
    record = own_record(model)
    assert record is not None
    content = _sum(contents, weights, record.originals.__getitem__)
    plan = plan_for(model, content, adapter_name, f"the sum of {_named(contents)}")
    report = install(plan, content, trainable=False)
    set_active(model, adapter_name)
    return report


@printable_errors
def weighted_sum_files(weights: Mapping[str | os.PathLike[str], float], path: str | os.PathLike[str]) -> Path:
    """Write the `weighted_sum` of adapter files to a new file, without their model.

    Modules trained in full can be summed only if the base is not needed, that is, if the weights add up to 1.

    Args:
        weights: Adapter file -> weight.
        path: The file to write; it may be one of the input files.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Under the conditions of `weighted_sum` and `load_adapter`.
    """
    _check_weights(weights)
    target = target_file(path)
    contents = {}
    for source in weights:
        if not Path(source).is_file():
            raise FileNotFoundError(f"no adapter file {str(source)!r}")
        contents[str(source)] = adapter_file.read(Path(source))
    content = _sum(contents, {str(source): weight for source, weight in weights.items()}, None)
    algorithm, crc32 = content.bases_checksum or (None, "")
    if algorithm != CRC32:  # from a file of an older version
        crc32 = bases_of(next(iter(contents)), content).crc32
    packed = adapter_file.pack(content.config, content.spec, crc32, content.targets, content.trained, content.saved)
    adapter_file.write(target, *packed)
    return target


def _content(model: nn.Module, adapter_name: str) -> AdapterFile:
    """The content that `save_adapter` would write, without copying it."""
    adapter, trained, saved = own_adapter(model, adapter_name)
    bases = get_bases(adapter.spec)
    stored = bases if isinstance(bases, StoredBases) else None
    return AdapterFile(adapter.config, adapter.spec, None, adapter.targets, trained, saved, stored)


@torch.no_grad()
def _sum(
    contents: Mapping[str, AdapterFile], weights: Mapping[str, float], base: Callable[[str], Tensor] | None
) -> AdapterFile:
    names = list(contents)
    first = contents[names[0]]
    alphas = {target.name: target.alpha for target in first.targets}
    factors: dict[str, dict[str, float]] = {}
    for name, content in contents.items():
        _check_alike(names[0], first, name, content)
        # The sum has one alpha, so differences in alpha are absorbed by lambda.
        factors[name] = {t.name: weights[name] * t.alpha / alphas[t.name] for t in content.targets}
    trained, apart = {}, []
    for target in first.trained:
        terms = [(*content.trained[target], factors[name][target]) for name, content in contents.items()]
        pair = _add(terms)
        if pair is None:
            apart.append(target)
        else:
            trained[target] = pair
    if apart:
        raise ValueError(
            f"no single adapter equals this sum of {_named(contents)}: lambda and gamma both differ at "
            f"{listing(apart, 1)}, and an update is bilinear in them. Keep the "
            "adapters active together (set_weights), and merge them if you want a single set of weights"
        )
    saved = {}
    for path in first.saved:
        saved[path] = _add_whole(path, [(contents[name].saved[path], weights[name]) for name in names], base)
    check_finite_pairs("the sum", trained, "the weights are too large")
    return AdapterFile(
        first.config, first.spec, first.bases_checksum, first.targets, trained, saved, first.stored, first.notes
    )


def _check_alike(first_name: str, first: AdapterFile, name: str, content: AdapterFile) -> None:
    """Raise ValueError unless both adapters have the same bases and adapt the same weights."""
    pair = f"{first_name!r} and {name!r}"
    if not _same_bases(first.spec, content.spec):
        raise ValueError(
            f"{pair} have different bases ({first.spec.kind}, seed {first.spec.seed}; {content.spec.kind}, seed "
            f"{content.spec.seed}): no single adapter equals their sum. Keep them active together (set_weights)"
        )
    shapes = [{target.name: (target.shape, target.rank) for target in each.targets} for each in (first, content)]
    if shapes[0] != shapes[1]:
        different = sorted(
            key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key)
        )
        raise ValueError(
            f"{pair} adapt different weights, or use different ranks ({different[0]}): no single adapter equals their "
            "sum. Keep them active together (set_weights)"
        )
    if first.saved.keys() != content.saved.keys():
        raise ValueError(f"{pair} train different modules in full: {sorted(first.saved.keys() ^ content.saved.keys())}")


def _same_bases(one: BasesSpec, other: BasesSpec) -> bool:
    if one.kind in _WINDOWS:
        return (one.kind, one.seed) == (other.kind, other.seed)
    return one == other


def _add(terms: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor] | None:
    """Lambda and gamma of the sum of the terms (lambda, gamma, factor), or None if no single pair equals it."""
    lam, gamma, _ = terms[0]
    terms = [term for term in terms if term[2] != 0 and term[0].any() and term[1].any()]
    if not terms:
        return torch.zeros_like(lam), gamma.clone()
    lam, gamma, factor = terms[0]
    if all(torch.equal(term[1], gamma) for term in terms):
        total = sum((term[0].double() * term[2] for term in terms), torch.zeros_like(lam, dtype=torch.float64))
        return total.to(lam.dtype), gamma.clone()
    if all(torch.equal(term[0], lam) for term in terms):
        total = sum((term[1].double() * term[2] for term in terms), torch.zeros_like(gamma, dtype=torch.float64))
        return lam.clone(), total.to(gamma.dtype)
    return None


def _add_whole(path: str, tensors: list[tuple[Tensor, float]], base: Callable[[str], Tensor] | None) -> Tensor:
    """Return ``base + sum of w * (trained - base)`` for one tensor; integers (counters) are taken from the first."""
    like = tensors[0][0]
    if not like.is_floating_point():
        return like.clone()
    rest = 1 - math.fsum(weight for _, weight in tensors)
    total = sum((tensor.double() * weight for tensor, weight in tensors), torch.zeros_like(like, dtype=torch.float64))
    if abs(rest) > 1e-12:
        if base is None:
            raise ValueError(
                f"{path} was trained in full, and its sum needs the base model's values: load the adapters into their "
                "model and use weighted_sum, or give weights that add up to 1"
            )
        total = total + rest * base(path).to(total)
    return total.to(like.dtype)


def _check_weights(weights: Mapping[str, float] | Mapping[str | os.PathLike[str], float]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"weights must map adapters to numbers, got {weights!r}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {str(name)!r} must be a finite number, got {weight!r}")


def _named(contents: Mapping[str, AdapterFile]) -> str:
    return ", ".join(repr(name) for name in contents)
