"""The formats of LoRA files that consist of one file: one class per format.

A file consists of pieces: usually one per layer, but kohya's tools stack several diffusers layers in one.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision.files.atomic import replacing
from randlora_vision.integrations.export.kohya_names import Stack, stack_of
from randlora_vision.integrations.export.low_rank import Choice, ExportReport, Factors
from randlora_vision.integrations.export.updates import Update, components
from randlora_vision.names import listing

Contents = Mapping[str, Tensor | Factors]
"""Key of a piece -> complete update (O, I...), or factors."""
Whole = Mapping[tuple[str, str], Tensor]
"""(component, path) -> tensor of a module trained in full."""
_TEXT_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"})
"""The layers of text encoders that LoRA loaders support."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Piece(NamedTuple):
    """One entry of a file."""

    key: str  # without a suffix
    parts: tuple[Update | int, ...]  # whose rows it stacks; a number stands for that many unadapted rows
    swapped: bool = False  # whether the second half of the rows comes first

    @property
    def name(self) -> str:
        """The name in a report."""
        first = self.parts[0]
        return first.name if len(self.parts) == 1 and isinstance(first, Update) else self.key

    def delta(self) -> Tensor:
        """Return the update (O, I); for a convolution, in the shape of its weight."""
        known = [part.delta() if isinstance(part, Update) else part for part in self.parts]
        like = next(part for part in known if isinstance(part, Tensor))
        rows = [like.new_zeros(part, like.shape[1]) if isinstance(part, int) else part for part in known]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole


class Format:
    """A format of one file with low-rank updates; subclasses choose the names and the tensors."""

    name: str
    whole_modules = False
    """Whether the format holds modules trained in full."""

    def choice(self, rank: int | None, energy: float | None) -> Choice | None:
        """Return how much of an update to keep; None for complete updates."""
        return Choice(rank, energy)

    def check_path(self, path: Path) -> None:
        """Raise ValueError if the format cannot be written there."""
        if path.suffix != ".safetensors":
            raise ValueError(f"the format {self.name!r} needs one .safetensors file, got the name {str(path)!r}")

    def check(self, host: Any, found: Sequence[Update], whole: Whole) -> None:
        """Raise ValueError, with the layers at fault, if the format cannot hold the updates."""
        wrong = [(update.name, reason) for update in found if (reason := self.problem(host, update))]
        if wrong:
            shown = listing((f"{name}: {reason}" for name, reason in wrong), 3, "; ")
            raise ValueError(f"the format {self.name!r} cannot hold {len(wrong)} of the adapted layers ({shown})")
        if whole and not self.whole_modules:
            names = listing((".".join(key).strip(".") for key in whole), 3)
            raise ValueError(f"the format {self.name!r} cannot hold modules trained in full (modules_to_save: {names})")

    def problem(self, host: Any, update: Update) -> str | None:
        """Return why the format cannot hold a layer, or None."""
        return not_low_rank(update) or _not_loaded(host, update)

    def pieces(self, host: Any, found: Sequence[Update]) -> list[Piece]:
        """Return the entries of the file."""
        return [Piece(self.key(host, update), (update,)) for update in found]

    def key(self, host: Any, update: Update) -> str:
        """Return the name of a layer's entry."""
        raise NotImplementedError

    def tensors(self, contents: Contents) -> dict[str, Tensor]:
        """Return what the file stores."""
        raise NotImplementedError

    def write(self, path: Path, model: nn.Module, contents: Contents, whole: Whole, report: ExportReport) -> None:
        """Write the file; `model` is the one with the first layer."""
        self.save(path, self.tensors(contents), report)

    def save(self, path: Path, tensors: Mapping[str, Tensor], report: ExportReport) -> None:
        """Write tensors, and the report as the file's metadata."""
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        with replacing(path) as temporary:
            safetensors.torch.save_file(on_cpu, temporary, report.metadata())


class Diffusers(Format):
    """diffusers' names and PEFT's suffixes."""

    name = "diffusers"

    def key(self, host: Any, update: Update) -> str:
        """Return the component, by its name in pipelines, and the path."""
        component = update.component or ("unet" if _is_unet(host, update) else "transformer")
        return f"{component}.{_path(host, update)}"

    def tensors(self, contents: Contents) -> dict[str, Tensor]:
        """Pad with zeros, so that all layers of a component have the same rank.

        Without alphas in the file, diffusers uses the rank of the first layer as alpha for all layers.
        """
        ranks: dict[str, int] = {}
        for key, (up, _) in contents.items():
            component = key.partition(".")[0]
            ranks[component] = max(ranks.get(component, 0), up.shape[1])
        tensors = {}
        for key, factors in contents.items():
            assert isinstance(factors, Factors)
            padded = factors.padded(ranks[key.partition(".")[0]])
            tensors.update({f"{key}.lora_A.weight": padded.down, f"{key}.lora_B.weight": padded.up})
        return tensors


class Kohya(Format):
    """The names of kohya's sd-scripts and musubi-tuner."""

    name = "kohya"

    def problem(self, host: Any, update: Update) -> str | None:
        """Return why the format cannot hold a layer, or None."""
        return super().problem(host, update) or (None if _stack(host, update) else "kohya's tools have no such layer")

    def pieces(self, host: Any, found: Sequence[Update]) -> list[Piece]:
        """Return one entry per layer of the original model; the rows of unadapted parts are zero."""
        by_path = {(update.component, update.path): update for update in found}
        pieces = {}
        for update in found:
            stack = _stack(host, update)
            assert stack is not None
            model = components(host)[update.component]
            parts = tuple(
                by_path.get((update.component, path)) or int(model.get_submodule(path).out_features)
                for path in stack.paths
            )
            pieces[stack.name] = Piece(stack.name, parts, stack.swapped)
        return list(pieces.values())

    def tensors(self, contents: Contents) -> dict[str, Tensor]:
        """Write one alpha for all layers, so that diffusers cannot confuse the alphas of different layers.

        The update is (alpha / rank) up down: `up` is rescaled to compensate for the factor.
        """
        alpha = max(len(down) for _, down in contents.values())
        tensors = {}
        for key, (up, down) in contents.items():
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=down.dtype)
            tensors[f"{key}.lora_up.weight"] = up * (len(down) / alpha)
        return tensors


class Lycoris(Format):
    """Complete updates, as LyCORIS's ``full`` modules: kohya's names for UNets and text encoders, else the paths."""

    name = "lycoris"

    def choice(self, rank: int | None, energy: float | None) -> Choice | None:
        """Return None: the format takes neither."""
        if rank is not None or energy is not None:
            raise ValueError("the format 'lycoris' stores the complete update: give neither rank nor energy")
        return None

    def problem(self, host: Any, update: Update) -> str | None:
        """Return why the format cannot hold a layer, or None."""
        return _not_loaded(host, update) or _not_a_layer(update)

    def key(self, host: Any, update: Update) -> str:
        """Return the name of a layer's entry."""
        stack = _stack(host, update)
        if stack is not None and (update.component.startswith("text_encoder") or _is_unet(host, update)):
            return stack.name
        return f"lycoris_{_path(host, update).replace('.', '_')}"

    def tensors(self, contents: Contents) -> dict[str, Tensor]:
        """Return the updates."""
        return {f"{key}.diff": delta for key, delta in contents.items() if isinstance(delta, Tensor)}


def not_low_rank(update: Update) -> str | None:
    """Return why a layer's update cannot be written as a product of two small layers, or None."""
    module = update.module
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, _CONVOLUTIONS):
        return "a transposed convolution"
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return "a grouped convolution"
    return _not_a_layer(update)


def _not_a_layer(update: Update) -> str | None:
    if update.param != "weight":
        return "a parameter that is not the weight of a layer"
    if update.state.transposed:
        return "a transposed linear layer (Conv1D of transformers)"
    return None


def _not_loaded(host: Any, update: Update) -> str | None:
    """Return why the pipeline's own loader would leave a layer out, or None."""
    component = update.component
    if not component:
        return None
    loadable = getattr(host, "_lora_loadable_modules", ())
    if component not in loadable:
        return f"{type(host).__name__} loads LoRA into {', '.join(loadable) or 'no component'} only"
    if component.startswith("text_encoder"):
        if update.path.rpartition(".")[2] not in _TEXT_LAYERS:
            return f"in text encoders, only {', '.join(sorted(_TEXT_LAYERS))} are loaded"
    elif getattr(host, f"{component}_name", None) != component:
        return f"no file names {component}: export that model by itself and load it with load_into_{component}=True"
    return None


def _is_unet(host: Any, update: Update) -> bool:
    return "UNet" in type(components(host)[update.component]).__name__


def _path(host: Any, update: Update) -> str:
    """The path of the module; transformers 5 removed a level of CLIP's text model that loaders still expect."""
    model = components(host)[update.component]
    flattened = type(model).__name__.startswith("CLIPTextModel") and not hasattr(model, "text_model")
    return f"text_model.{update.path}" if flattened else update.path


def _stack(host: Any, update: Update) -> Stack | None:
    """The layer of the original model, under its complete name; None if kohya's tools have no such layer."""
    if update.component.startswith("text_encoder"):
        only = getattr(host, "_lora_loadable_modules", ()) == ["unet", "text_encoder"]
        number = "" if only else update.component.removeprefix("text_encoder").removeprefix("_") or "1"
        return Stack(f"lora_te{number}_{_path(host, update).replace('.', '_')}", (update.path,))
    stack = stack_of(components(host)[update.component], update.path)
    return None if stack is None else stack._replace(name=f"lora_unet_{stack.name}")
