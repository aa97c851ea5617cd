"""Names of the layers of a model in the LoRA files of other tools.

A file consists of pieces: usually one per layer, but kohya's files for Flux stack several diffusers layers in one.
Shapes: O out, I in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_vision.integrations.export.updates import Update, components

_TEXT_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"})
"""The layers of text encoders that LoRA loaders support."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# kohya's name for a layer of Flux (from Black Forest Labs' code) -> the diffusers layers whose rows it stacks.
_FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX_ROOT = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in_out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    "final_layer_linear": ("proj_out",),
}
_HALVES_SWAPPED = "final_layer_adaLN_modulation_1"  # shift and scale, in the opposite order in diffusers
# kohya's files use the original names for these two SDXL layers, even where the others have diffusers' names.
_UNET_NAMES = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


class Piece(NamedTuple):
    """One entry of a file.

    Attributes:
        key: Name of the entry, without a suffix.
        parts: The layers whose rows it stacks; a number stands for that many rows of an unadapted layer.
        swapped: True if the second half of the rows comes first.
    """

    key: str
    parts: tuple[Update | int, ...]
    swapped: bool = False

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


def diffusers_pieces(host: Any, found: Sequence[Update]) -> list[Piece]:
    """Return one piece per layer, under the names that ``pipe.load_lora_weights`` and ComfyUI read."""
    refuse(found, "diffusers", lambda update: low_rank_problem(update) or _loader_problem(host, update))
    return [Piece(f"{_denoiser(host, update)}.{_path(host, update)}", (update,)) for update in found]


def kohya_pieces(host: Any, found: Sequence[Update]) -> list[Piece]:
    """Return the pieces under the names of kohya's sd-scripts, which ComfyUI, Forge and diffusers read."""
    refuse(
        found,
        "kohya",
        lambda update: low_rank_problem(update) or _loader_problem(host, update) or _kohya_problem(host, update),
    )
    text = [update for update in found if update.component.startswith("text_encoder")]
    rest = [update for update in found if update not in text]
    named = [Piece(_underscored(host, update), (update,)) for update in text]
    flux: dict[str, list[Update]] = {}
    for update in rest:
        if _is_flux(_model(host, update)):
            flux.setdefault(update.component, []).append(update)
        else:
            named.append(Piece(_underscored(host, update), (update,)))
    for component, own in flux.items():
        named += _flux_pieces(components(host)[component], {update.path: update for update in own})
    return named


def lycoris_pieces(host: Any, found: Sequence[Update]) -> list[Piece]:
    """Return one piece per layer under LyCORIS names: kohya's for UNets and text encoders, else ``lycoris_`` + path."""
    refuse(found, "lycoris", lambda update: _loader_problem(host, update) if update.component else _not_a_layer(update))
    return [Piece(_underscored(host, update), (update,)) for update in found]


def refuse(found: Sequence[Update], format: str, problem: Callable[[Update], str | None]) -> None:
    """Raise ValueError naming the layers that have a problem."""
    wrong = [(update.name, reason) for update in found if (reason := problem(update))]
    if wrong:
        shown = "; ".join(f"{name}: {reason}" for name, reason in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the format {format!r} cannot hold {len(wrong)} of the adapted layers ({shown}{more}): "
            "save the merged model instead, or train without them (exclude_modules)"
        )


def _not_a_layer(update: Update) -> str | None:
    if update.param != "weight":
        return "a parameter that is not the weight of a layer"
    if update.state.transposed:
        return "a transposed linear layer (Conv1D of transformers)"
    return None


def low_rank_problem(update: Update) -> str | None:
    """Return why a layer's update cannot be written as a product of two small layers, or None."""
    module = update.module
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, _CONVOLUTIONS):
        return "a transposed convolution"
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return "a grouped convolution"
    return _not_a_layer(update)


def _loader_problem(host: Any, update: Update) -> str | None:
    if not update.component:
        return None
    loadable = getattr(host, "_lora_loadable_modules", ())
    if update.component not in loadable:
        return f"{type(host).__name__} loads LoRA into {', '.join(loadable) or 'no component'} only"
    if update.component.startswith("text_encoder") and update.path.rpartition(".")[2] not in _TEXT_LAYERS:
        return f"in text encoders, only {', '.join(sorted(_TEXT_LAYERS))} are loaded"
    return _not_a_layer(update)


def _kohya_problem(host: Any, update: Update) -> str | None:
    model = _model(host, update)
    if _is_unet(model) or update.component.startswith("text_encoder"):
        return None
    if not _is_flux(model):
        return f"kohya's names for {type(model).__name__} are not supported; ComfyUI reads the format 'diffusers'"
    known = {path for _, paths in _flux_table(model) for path in paths}
    return None if update.path in known else "kohya's files for Flux have no such layer"


def _model(host: Any, update: Update) -> nn.Module:
    return components(host)[update.component]


def _is_unet(model: nn.Module) -> bool:
    return "UNet" in type(model).__name__


def _is_flux(model: nn.Module) -> bool:
    return type(model).__name__ == "FluxTransformer2DModel"


def _denoiser(host: Any, update: Update) -> str:
    """The name of the component; for a bare model, its name in pipelines."""
    return update.component or ("unet" if _is_unet(_model(host, update)) else "transformer")


def _path(host: Any, update: Update) -> str:
    """The path of the module; transformers 5 removed a level of CLIP's text model that loaders still expect."""
    model = _model(host, update)
    flattened = type(model).__name__.startswith("CLIPTextModel") and not hasattr(model, "text_model")
    return f"text_model.{update.path}" if flattened else update.path


def _underscored(host: Any, update: Update) -> str:
    name = _path(host, update).replace(".", "_")
    if update.component.startswith("text_encoder"):
        several = "text_encoder_2" in getattr(host, "_lora_loadable_modules", ())
        number = update.component.removeprefix("text_encoder").removeprefix("_") or "1"
        return f"lora_te{number if several else ''}_{name}"
    if _is_unet(_model(host, update)):
        return f"lora_unet_{_UNET_NAMES.get(name, name)}"
    return f"lycoris_{name}"


def _flux_table(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """(kohya's name, paths in diffusers) of every layer of a Flux transformer."""
    table: list[tuple[str, tuple[str, ...]]] = [(f"lora_unet_{name}", paths) for name, paths in _FLUX_ROOT.items()]
    blocks: tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...] = (
        ("transformer_blocks", "double_blocks", _FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _FLUX_SINGLE),
    )
    for ours, theirs, layers in blocks:
        for i in range(len(model.get_submodule(ours))):  # type: ignore[arg-type]
            for name, paths in layers.items():
                table.append((f"lora_unet_{theirs}_{i}_{name}", tuple(f"{ours}.{i}.{path}" for path in paths)))
    return table


def _flux_pieces(model: nn.Module, by_path: Mapping[str, Update]) -> list[Piece]:
    pieces = []
    for key, paths in _flux_table(model):
        if any(path in by_path for path in paths):
            parts = tuple(by_path.get(path) or int(model.get_submodule(path).out_features) for path in paths)  # type: ignore[arg-type]
            pieces.append(Piece(key, parts, swapped=re.search(_HALVES_SWAPPED, key) is not None))
    return pieces
