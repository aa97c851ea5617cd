"""What fine-tuning changed: spectra of updates, similarity of features, and the loss on the plane through three models.

Shapes: O out, I in (channels times kernel size for a convolution), m = min(O, I), N samples, D features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]  # by the parameter's name in the base model


def effective_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the weights that a model with any kind of adapter computes with, by their names in the base."""
    found = {}
    for name in names:
        path, _, parameter = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), parameter).detach().clone()
    return found


def updates(base: Weights, adapted: Weights) -> dict[str, Tensor]:
    """Return adapted - base (O, I) of every matrix that differs, convolution kernels flattened."""
    return {
        name: (adapted[name] - weight).flatten(1)
        for name, weight in base.items()
        if weight.ndim > 1 and not torch.equal(weight, adapted[name])
    }


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the singular values (m,) over their sum (Roy and Vetterli, 2007)."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total else 0.0


def cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of features (N, D) and (N, E) (Kornblith et al., 2019)."""
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).norm() ** 2 / norms) if norms else 0.0


@dataclass(frozen=True)
class Plane:
    """The plane through three models, in an orthonormal basis of the space of all weights.

    Attributes:
        origin: The first model.
        axes: Two directions of norm 1.
        points: Coordinates of the three models.
    """

    origin: Weights
    axes: tuple[Weights, Weights]
    points: tuple[tuple[float, float], ...]

    def at(self, u: float, v: float) -> dict[str, Tensor]:
        """Return the weights at a point."""
        first, second = self.axes
        return {name: value + u * first[name] + v * second[name] for name, value in self.origin.items()}


def plane_through(first: Weights, second: Weights, third: Weights) -> Plane:
    """Return the plane through three models; raise ValueError if they lie on a line."""
    a = {name: second[name] - value for name, value in first.items()}
    b = {name: third[name] - value for name, value in first.items()}
    length = _dot(a, a) ** 0.5
    u = {name: value / (length or 1.0) for name, value in a.items()}
    along = _dot(b, u)
    rest = {name: value - along * u[name] for name, value in b.items()}
    height = _dot(rest, rest) ** 0.5
    if not length or height < 1e-6 * length:
        raise ValueError("the three models lie on a line: there is no plane through them")
    v = {name: value / height for name, value in rest.items()}
    return Plane(first, (u, v), ((0.0, 0.0), (length, 0.0), (along, height)))


def _dot(a: Weights, b: Weights) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


@torch.no_grad()
def landscape(
    plane: Plane, base: nn.Module, loss: Callable[[nn.Module], float], steps: int, margin: float = 0.35
) -> tuple[list[float], list[float], list[list[float]]]:
    """Return the coordinates u and v of a square grid of points around the three models, and loss[v][u].

    `margin` is the room on either side, relative to the larger extent of the three.
    """
    ranges = [(min(values), max(values)) for values in zip(*plane.points, strict=True)]
    half = (0.5 + margin) * max(high - low for low, high in ranges)
    middles = [(low + high) / 2 for low, high in ranges]
    sides = [torch.linspace(middle - half, middle + half, steps).tolist() for middle in middles]
    rows = []
    for v in sides[1]:
        row = []
        for u in sides[0]:
            with weights_of(base, plane.at(u, v)):
                row.append(loss(base))
        rows.append(row)
    return sides[0], sides[1], rows


@contextmanager
def weights_of(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Give a model other weights inside the context."""
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in weights}
    with torch.no_grad():
        try:
            for name, value in weights.items():
                own[name].copy_(value)
            yield
        finally:
            for name, value in before.items():
                own[name].copy_(value)


def blocks_with(model: nn.Module, changed: Iterable[str]) -> list[str]:
    """Return the outermost elements of lists of modules that contain a changed weight, in their order."""
    changed = list(changed)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name.rpartition(".")[0] in lists and not inside and any(weight.startswith(f"{name}.") for weight in changed):
            found.append(name)
    return found


@torch.no_grad()
def block_features(model: nn.Module, blocks: Sequence[str], run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Return the output of each block, averaged over tokens or positions, (N, D), when `run` calls the model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            features = output[0] if isinstance(output, tuple) else output
            seen[name].append(features.flatten(2).mean(2) if features.ndim == 4 else features.mean(1))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).float() for name, parts in seen.items() if parts}
