"""Norms, ranks and singular values of the updates in an adapter file, computed without the base model.

Shapes: O out, I in, m = min(O, I).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from randlora_vision.bases import Bases
from randlora_vision.compute.functional import effective_weight
from randlora_vision.figures import figure_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.claims import bases_of
from randlora_vision.report import Target

_NAMED = 12  # most layers named in a plot
_ROUNDING = 1e-8  # smaller singular values, relative to the largest, are rounding errors


@dataclass(frozen=True)
class Layer:
    """One adapted parameter of a file."""

    target: Target  # the parameter, with the pipeline's component as a prefix of its name
    values: Tensor  # singular values of the update (m,), largest first

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for no update."""
        total = self.values.sum()
        if total == 0:
            return 0.0
        shares = self.values / total
        return float(torch.special.entr(shares).sum().exp())


def layers_of(path: Path, parts: Mapping[str, AdapterFile], progress: Callable[[int, int], None]) -> list[Layer]:
    """Return the layers of an adapter file in their order; raises ValueError as `claims.bases_of` does."""
    total = sum(len(content.targets) for content in parts.values())
    found: list[Layer] = []
    for part, content in parts.items():
        bases = bases_of(path, content)
        for target in content.targets:
            name = ".".join(piece for piece in (part, target.name) if piece)
            found.append(Layer(replace(target, name=name), spectrum(content, target, bases)))
            progress(len(found), total)
    return found


@torch.no_grad()
def spectrum(content: AdapterFile, target: Target, bases: Bases) -> Tensor:
    """Return the singular values (m,) of one update in float64."""
    lam, gamma = (tensor.float() for tensor in content.trained[target.name])
    term = bases.term(lam, gamma, max(target.shape), target.alpha / target.rank, torch.float32)
    return torch.linalg.svdvals(effective_weight(torch.zeros(target.shape), (term,))).double()


def plot_spectra(layers: Sequence[Layer], title: str, path: Path) -> None:
    """Plot each update's singular values, relative to the largest: up to 12 layers by name, more by a colour bar."""
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
    except ModuleNotFoundError:
        raise ValueError("--plot needs matplotlib: pip install 'randlora_vision[cli]'") from None
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a .png, got {str(path)!r}")
    shown = [layer for layer in layers if layer.norm > 0]
    with figure_file(path, (8, 5), title, layout="constrained") as figure:
        if not shown:
            figure.text(0.5, 0.5, "every update is zero", ha="center")
            return
        axes = figure.subplots()
        scale, colours = Normalize(1, max(2, len(shown))), colormaps["viridis"]
        lowest = 1.0
        for number, layer in enumerate(shown, 1):
            share = torch.arange(1, len(layer.values) + 1) / len(layer.values)
            values = layer.values / layer.values[0]
            lowest = min(lowest, float(values.clamp(min=_ROUNDING).min()))
            label = layer.target.name if len(shown) <= _NAMED else None
            axes.plot(share, values, color=colours(scale(number)), label=label, marker="" if len(values) > 1 else "o")
        axes.set(
            xlabel="index of the singular value / narrow side of the weight",
            ylabel="singular value / largest one",
            yscale="log",
            ylim=(lowest / 2, 2),
        )
        if len(shown) <= _NAMED:
            axes.legend(fontsize=7)
        else:
            figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer, in the order of the file")
