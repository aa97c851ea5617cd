"""LoRA on the same weights that RandLoRA adapts, for comparison: W + (alpha / r) B A.

It is a parametrization of the weight, so it takes effect wherever the model reads that weight. PEFT
wraps layers instead: it wraps the out_proj of PyTorch's attention, which is never called as a layer, and it
cannot reach the projections that open_clip's attention keeps as bare parameters. Where PEFT does take
effect, the two compute the same numbers (tests/training/methods/test_lora.py).

Shapes: O out, I in (channels times kernel size for a convolution), R rank.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from randlora_vision.errors import printable_errors
from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.methods.adaptation import copy_tensors, finite_gradients, move, unfrozen

FORMAT = "randlora_vision.lora"


class LowRank(nn.Module):
    """Parametrization W -> W + (alpha / rank) up @ down; `up` (O, R) starts at zero, `down` (R, I) is random."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, sides(weight)[1], device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as in PEFT and in the code of the LoRA paper

    @property
    def first(self) -> nn.Parameter:
        """The parameter that has a gradient from the first step on."""
        return self.up

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective weight, in the shape and dtype of `weight`."""
        delta = self.scale * (self.up @ self.down)
        return weight + delta.view_as(weight).to(weight.dtype)


def weight_of(model: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Return (module, parameter name) for a target: the path of a module (its `weight`) or of a parameter."""
    path, _, parameter = target.rpartition(".")
    modules = dict(model.named_modules())
    if target in modules:
        return modules[target], "weight"
    if path in modules and isinstance(getattr(modules[path], parameter, None), Tensor):
        return modules[path], parameter
    raise ValueError(f"the model {type(model).__name__} has no weight {target!r}")


def sides(weight: Tensor) -> tuple[int, int]:
    """Return (O, I) of a weight."""
    return weight.shape[0], weight[0].numel()


def check_rank(method: str, rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError for a rank above the smaller side of a weight."""
    for target, shape in shapes.items():
        if rank > min(shape):
            raise ValueError(f"{method} rank {rank} is above the smaller side of {target}, {min(shape)}")


def inject_lora(model: nn.Module, targets: Iterable[str], rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze `model`, add LoRA to the targets and return it by target; raise ValueError for a rank above a side."""
    found = {target: weight_of(model, target) for target in targets}
    check_rank("LoRA", rank, {target: sides(getattr(*place)) for target, place in found.items()})
    model.requires_grad_(False)
    added = {}
    for target, (module, name) in found.items():
        added[target] = LowRank(getattr(module, name), rank, alpha)
        parametrize.register_parametrization(module, name, added[target])
    return added


def save_lora(
    added: Mapping[str, LowRank], path: Path, rank: int, alpha: float, whole: Mapping[str, nn.Parameter] = {}
) -> None:
    """Write the trained tensors, and what is needed to load them, to one safetensors file.

    `whole` are parameters of the model that were trained in full.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in {**_tensors(added), **whole}.items()}
    metadata = {"format": FORMAT, "rank": str(rank), "alpha": str(alpha), "targets": json.dumps(list(added))}
    if whole:
        metadata["whole"] = json.dumps(list(whole))
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def _tensors(added: Mapping[str, LowRank]) -> dict[str, nn.Parameter]:
    return {f"{t}.{name}": p for t, part in added.items() for name, p in (("lora_A", part.down), ("lora_B", part.up))}


@printable_errors
def load_lora(model: nn.Module, path: Path | str, scale: float = 1.0) -> None:
    """Add the LoRA in a file to a base model, frozen, with the `scale` of its change.

    Raises ValueError for a file that is not one or does not fit.
    """
    tensors, metadata = read_tensors(Path(path))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a LoRA file written by this package")
    texts = check_object(metadata, {"targets": str, "rank": str, "alpha": str}, path)
    targets = check_type(parse_json(texts["targets"], path), list[str], path, "targets")
    rank = check_type(parse_json(texts["rank"], path), int, path, "rank")
    alpha = check_type(parse_json(texts["alpha"], path), float, path, "alpha")
    names = check_type(parse_json(metadata.get("whole", "[]"), path), list[str], path, "whole")
    whole = {name: tensors.pop(name) for name in names if name in tensors}
    shapes: dict[str, tuple[int, int]] = {}
    for target in targets:
        rows, columns = sides(getattr(*weight_of(model, target)))
        shapes |= {f"{target}.lora_A": (rank, columns), f"{target}.lora_B": (rows, rank)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if rank < 1 or found != shapes:
        wrong = sorted(name for name in {**found, **shapes} if found.get(name) != shapes.get(name))
        raise ValueError(f"{path} does not hold LoRA tensors of rank {rank} for this model: {listing(wrong, 3)}")
    move(model, whole, Path(path), scale)
    with torch.no_grad():
        for target, part in inject_lora(model, targets, rank, alpha).items():
            part.down.copy_(tensors[f"{target}.lora_A"])
            part.up.copy_(tensors[f"{target}.lora_B"])
            part.scale *= scale
            part.requires_grad_(False)


class LoRA:
    """LoRA: two low-rank factors added to each weight."""

    def __init__(
        self, model: nn.Module, targets: Sequence[str], rank: int, alpha: float, whole: Iterable[str] = ()
    ) -> None:
        self.added: Mapping[str, Any] = inject_lora(model, targets, rank, alpha)
        self.whole = unfrozen(model, whole)
        self.rank = rank
        self.alpha = alpha
        self.report = f"LoRA of rank {rank}, alpha {alpha:g}, on {len(self.added)} weights"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the factors of every adapted weight, then the parameters that are trained in full."""
        for target, part in self.added.items():
            for name, parameter in part.named_parameters():
                yield f"{target}.{name}", parameter
        yield from self.whole.items()

    def check_gradients(self) -> list[str]:
        """Require a gradient, which may be zero behind a residual branch that is initialised to zero."""
        dead = [name for name, part in self.added.items() if part.first.grad is None]
        if dead:
            raise ValueError(f"no gradient reaches the adapters of {listing(dead, 3)}")
        return finite_gradients(self.parameters())

    def save(self, path: Path) -> None:
        """Write the factors."""
        save_lora(self.added, path, self.rank, self.alpha, self.whole)

    def load(self, model: nn.Module, path: Path) -> None:
        """Load the factors."""
        load_lora(model, path)

    def start_from(self, path: Path) -> None:
        """Copy the factors of a file of the same alpha."""
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT or metadata.get("alpha") != str(self.alpha):
            raise ValueError(f"{path} is not a LoRA file of alpha {self.alpha:g} written by this package")
        copy_tensors({**_tensors(self.added), **self.whole}, tensors, path)

    def loading_code(self, path: Path) -> list[str]:
        """Return the call of `load_lora`."""
        return ["from randlora_vision.training.methods.lora import load_lora", f"load_lora(model, {str(path)!r})"]
