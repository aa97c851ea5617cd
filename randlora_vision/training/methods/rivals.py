"""DoRA, VeRA and NoLA on the same weights that RandLoRA adapts, for comparison; PEFT cannot reach all of them (`lora`).

Each is a parametrization of the weight. All start at the base model.

Shapes: O out, I in (channels times kernel size for a convolution), R rank, K matrices in a bank of NoLA.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from randlora_vision.errors import printable_errors
from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.json_values import check_object, parse_json
from randlora_vision.training.methods.adaptation import copy_tensors, move, unfrozen
from randlora_vision.training.methods.lora import LoRA, check_rank, sides, weight_of

_FORMAT = "randlora_vision.rival"
_NOLA_RANK = 8
_LARGEST = 1024  # rank of VeRA, and K of NoLA, that a budget chooses


class Rival(nn.Module):
    """Parametrization W -> W + strength (adapted(W) - W)."""

    strength = 1.0

    @property
    def first(self) -> nn.Parameter:
        """The parameter that has a gradient from the first step on."""
        raise NotImplementedError

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the adapted weight (O, I) in float32."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective weight, in the shape and dtype of `weight`."""
        flat = weight.flatten(1).float()
        return torch.lerp(flat, self.adapted(flat), self.strength).view_as(weight).to(weight.dtype)


class DoRA(Rival):
    """W -> m V / |V| with V = W + (alpha / R) up @ down, norms of rows, m (O,) trained (arXiv 2402.09353)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        flat = weight.detach().flatten(1).float()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, flat.shape[1], device=weight.device))
        self.up = nn.Parameter(torch.zeros(flat.shape[0], rank, device=weight.device))
        self.magnitude = nn.Parameter(flat.norm(dim=1))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def first(self) -> nn.Parameter:
        """The left factor."""
        return self.up

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the adapted weight. As in the paper, no gradient flows through the norm."""
        direction = weight + self.scale * (self.up @ self.down)
        return direction * (self.magnitude / direction.detach().norm(dim=1).clamp(min=1e-12))[:, None]


class VeRA(Rival):
    """W -> W + diag(b) B diag(d) A with shared random A (R, I) and B (O, R), b (O,) and d (R,) trained (2310.11454)."""

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.shared = (left, right)  # in a tuple: neither buffers, nor copied once per weight
        self.b = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device))
        self.d = nn.Parameter(torch.full((len(right),), 0.1, device=weight.device))

    @property
    def first(self) -> nn.Parameter:
        """The outer factor."""
        return self.b

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        left, right = self.shared
        rows, columns = weight.shape
        return weight + self.b[:, None] * (left[:rows] @ (self.d[:, None] * right[:, :columns]))


class NoLA(Rival):
    """W -> W + B A with A = sum_k a_k A_k (8, I) and B = sum_k b_k B_k (O, 8), a and b (K,) trained (2310.02556)."""

    def __init__(self, weight: Tensor, bank: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.shared = (bank,)
        start = torch.randn(len(bank), generator=generator) / math.sqrt(len(bank))
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(len(bank), device=weight.device))

    @property
    def first(self) -> nn.Parameter:
        """The coefficients of the left factor."""
        return self.b

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        (bank,) = self.shared
        rows, columns = weight.shape
        down = torch.einsum("k,kri->ri", self.a, bank[:, :, :columns]) / math.sqrt(columns)
        up = torch.einsum("k,kro->or", self.b, bank[:, :, :rows]) / math.sqrt(len(bank))
        return weight + up @ down


def inject_rival(
    model: nn.Module, method: str, targets: Iterable[str], rank: int, alpha: float, seed: int
) -> dict[str, Rival]:
    """Freeze `model` and add the method to the targets; return the trained modules by target name.

    `rank` is K for NoLA. The shared random matrices and NoLA's first coefficients follow `seed`. Raises ValueError,
    before anything changes, when DoRA's rank is above the smaller side of a target.
    """
    found = {target: weight_of(model, target) for target in targets}
    weights = {target: getattr(*place) for target, place in found.items()}
    shapes = {target: sides(weight) for target, weight in weights.items()}
    if method == "dora":
        check_rank("DoRA", rank, shapes)
    device = next(iter(weights.values())).device
    generator = torch.Generator().manual_seed(seed)
    tall, wide = (max(shape[side] for shape in shapes.values()) for side in (0, 1))

    def uniform(rows: int, columns: int) -> Tensor:
        """Return a matrix of Kaiming's uniform distribution for its columns, as PEFT's VeRA draws it."""
        bound = math.sqrt(3 / columns)
        return (2 * torch.rand(rows, columns, generator=generator) - 1).mul_(bound).to(device)

    if method == "vera":
        left, right = uniform(tall, rank), uniform(rank, wide)
        added: dict[str, Rival] = {target: VeRA(weight, left, right) for target, weight in weights.items()}
    elif method == "nola":
        narrow = min(_NOLA_RANK, *(min(shape) for shape in shapes.values()))
        bank = torch.randn(rank, narrow, max(tall, wide), generator=generator).to(device)
        added = {target: NoLA(weight, bank, generator) for target, weight in weights.items()}
    else:
        added = {target: DoRA(weight, rank, alpha) for target, weight in weights.items()}
    model.requires_grad_(False)
    for target, (module, name) in found.items():
        parametrize.register_parametrization(module, name, added[target])
    return added


def trained_numbers(method: str, shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Return how many numbers LoRA or a method of this file trains on weights of the shapes (O, I)."""
    per_weight: Mapping[str, Callable[[int, int], int]] = {
        "lora": lambda out, inputs: rank * (out + inputs),
        "dora": lambda out, inputs: rank * (out + inputs) + out,
        "vera": lambda out, inputs: rank + out,
        "nola": lambda out, inputs: 2 * rank,
    }
    return sum(per_weight[method](*shape) for shape in shapes)


def rank_for_budget(method: str, model: nn.Module, targets: Iterable[str], budget: int) -> int:
    """Return the rank with which a method trains about `budget` numbers on the targets: see `rank_for_shapes`."""
    return rank_for_shapes(method, [sides(getattr(*weight_of(model, target))) for target in targets], budget)


def rank_for_shapes(method: str, shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """Return the rank, 1 or more, with which a method trains about `budget` numbers on weights of the shapes (O, I).

    For VeRA and NoLA at most 1024, beyond which their cost grows without learning more.
    """
    fixed = trained_numbers(method, shapes, 0)
    rank = max(1, round((budget - fixed) / (trained_numbers(method, shapes, 1) - fixed)))
    return min(rank, _LARGEST) if method in ("vera", "nola") else rank


class RivalAdaptation(LoRA):
    """One of the methods of this file, behind the interface of `Adaptation`."""

    def __init__(
        self,
        model: nn.Module,
        method: str,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        seed: int,
        whole: Iterable[str] = (),
    ) -> None:
        self.added = inject_rival(model, method, targets, rank, alpha, seed)
        self.whole = unfrozen(model, whole)
        settings = {"method": method, "rank": rank, "alpha": alpha, "seed": seed, "targets": list(targets)}
        if self.whole:
            settings["whole"] = list(self.whole)
        self.metadata = {_FORMAT: json.dumps(settings)}
        size = f"{rank} random matrices" if method == "nola" else f"rank {rank}"
        self.report = f"{type(next(iter(self.added.values()))).__name__} of {size} on {len(self.added)} weights"

    def save(self, path: Path) -> None:
        """Write the trained tensors, and what the others are drawn from."""
        with replacing(path) as temporary:
            save_file({name: p.detach().contiguous() for name, p in self.parameters()}, temporary, self.metadata)

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the file."""
        load_rival(model, path)

    def start_from(self, path: Path) -> None:
        """Copy the tensors of a file with the same settings."""
        tensors, metadata = read_tensors(path)
        if metadata.get(_FORMAT) != self.metadata[_FORMAT]:
            raise ValueError(f"{path} was not written with these settings: {self.metadata[_FORMAT]}")
        copy_tensors(dict(self.parameters()), tensors, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_rival`."""
        return ["from randlora_vision.training.methods.rivals import load_rival", f"load_rival(model, {str(path)!r})"]


def is_rival(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata of a file are those of `RivalAdaptation.save`."""
    return _FORMAT in metadata


@printable_errors
def load_rival(model: nn.Module, path: Path | str, scale: float = 1.0) -> None:
    """Add the method in a file to a base model, frozen, with the `scale` of its change.

    Raises ValueError for a file that is not one or does not fit.
    """
    tensors, metadata = read_tensors(Path(path))
    if not is_rival(metadata):
        raise ValueError(f"{path} is not a file of DoRA, VeRA or NoLA written by this package")
    kinds = {"method": str, "rank": int, "alpha": float, "seed": int, "targets": list[str], "whole": list[str] | None}
    held = check_object(parse_json(metadata[_FORMAT], path), kinds, path)
    if held["method"] not in ("dora", "vera", "nola") or not 1 <= held["rank"] <= 1 << 16 or not held["targets"]:
        raise ValueError(f"{path}: expected a method (dora, vera, nola), a rank from 1 to 65536 and targets")
    whole = {name: tensors.pop(name) for name in held["whole"] or () if name in tensors}
    move(model, whole, Path(path), scale)
    added = inject_rival(model, held["method"], held["targets"], held["rank"], held["alpha"], held["seed"])
    own = {f"{target}.{name}": p for target, part in added.items() for name, p in part.named_parameters()}
    copy_tensors(own, tensors, Path(path))
    for part in added.values():
        part.requires_grad_(False)
        part.strength = scale
