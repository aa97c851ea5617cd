"""Export RandLoRA adapters as LoRA files for other tools, and report the approximation error.

A RandLoRA update has full rank, so a LoRA file holds its best approximation, layer by layer. Every export reports how
much of each update is lost, in its report and in the file's metadata (``randlora_export``). The format ``lycoris``
stores the updates completely.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from randlora_vision.files.atomic import replacing
from randlora_vision.integrations.export import lora_keys as _lora_keys
from randlora_vision.integrations.export.lora_keys import Piece
from randlora_vision.integrations.export.low_rank import Choice, ExportReport, LayerError, factorize, layer_error
from randlora_vision.integrations.export.peft_lora import write_peft
from randlora_vision.integrations.export.updates import trained_in_full, updates

FORMATS = ("diffusers", "kohya", "peft", "lycoris")
Progress = Callable[[int, int], None]


@torch.no_grad()
def export_lora(
    model_or_pipe: Any,
    path: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    format: str = "diffusers",
    adapter_name: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the update of an adapter as a LoRA file; the model is not changed.

    Args:
        model_or_pipe: A model with adapters, or a diffusers pipeline with such components.
        path: A ``.safetensors`` file; for ``peft``, a folder.
        rank: Rank of every layer, at most its narrow side. Give either this or `energy`.
        energy: Share of every update's squared Frobenius norm to keep; the smallest sufficient rank is used
            (``diffusers`` needs one rank for all layers of a component: smaller ranks are padded with zeros).
        format: ``diffusers`` (read by ``pipe.load_lora_weights`` and ComfyUI), ``kohya`` (sd-scripts, ComfyUI, Forge:
            UNets, Flux and CLIP text encoders), ``peft`` (``PeftModel.from_pretrained``, for any single model; PEFT
            wraps layers, so the update has no effect where a host reads ``module.weight`` itself) or ``lycoris``
            (complete updates, as ``.diff``; takes neither rank nor energy).
        adapter_name: Name of the adapter; None means all merged or active ones. Their current scales are applied.
        progress: Called after each layer with (layers done, total layers).

    Returns:
        The report, with the relative error of every layer and of all layers together.

    Raises:
        ValueError: If an argument is out of range, there is no such adapter, or the format cannot hold an adapted
            layer or the modules trained in full (``modules_to_save``, which only ``peft`` supports).
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "lycoris":
        if rank is not None or energy is not None:
            raise ValueError("the format 'lycoris' stores the complete update: give neither rank nor energy")
        choice = None
    else:
        choice = Choice(rank, energy)
    target = Path(path)
    if format != "peft" and target.suffix != ".safetensors":
        raise ValueError(f"the format {format!r} needs one .safetensors file, got the name {str(path)!r}")
    found = updates(model_or_pipe, adapter_name)
    whole = trained_in_full(model_or_pipe, adapter_name)
    if format == "peft":
        assert choice is not None
        return write_peft(model_or_pipe, target, found, whole, choice, progress)
    if whole:
        names = ", ".join(".".join(key).strip(".") for key in list(whole)[:3])
        raise ValueError(
            f"the format {format!r} cannot hold modules trained in full (modules_to_save: {names}): use the format "
            "'peft' or save the merged model"
        )
    name = {
        "diffusers": _lora_keys.diffusers_pieces,
        "kohya": _lora_keys.kohya_pieces,
        "lycoris": _lora_keys.lycoris_pieces,
    }[format]
    pieces = name(model_or_pipe, found)
    tensors: dict[str, Tensor] = {}
    layers: list[LayerError] = []
    for done, piece in enumerate(pieces, start=1):
        entries, layer = _entries(piece, choice)
        tensors.update(entries)
        layers.append(layer)
        if progress is not None:
            progress(done, len(pieces))
    if format == "diffusers":
        tensors = _one_rank(tensors)
    if format == "kohya":
        tensors = _kohya(tensors)
    report = ExportReport(format, str(target), choice, tuple(layers))
    with replacing(target) as temporary:
        safetensors.torch.save_file(tensors, temporary, report.metadata())
    return report


def _entries(piece: Piece, choice: Choice | None) -> tuple[dict[str, Tensor], LayerError]:
    """The tensors of one layer and their error."""
    delta = piece.delta()
    flat = delta.flatten(1)
    if choice is None:
        return {f"{piece.key}.diff": delta.cpu().contiguous()}, layer_error(piece.name, flat, flat, None)
    up, down = factorize(flat, choice)
    layer = layer_error(piece.name, flat, up @ down, up.shape[1])
    kernel = (1,) * (delta.ndim - 2)
    return {
        f"{piece.key}.lora_A.weight": down.reshape(-1, *delta.shape[1:]).cpu().contiguous(),
        f"{piece.key}.lora_B.weight": up.reshape(*up.shape, *kernel).cpu().contiguous(),
    }, layer


def _one_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pad with zeros, so that all layers of a component have the same rank.

    Without alphas in the file, diffusers (0.36 still) uses the rank of the first layer as alpha for all layers.
    """
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            component = key.partition(".")[0]
            ranks[component] = max(ranks.get(component, 0), len(tensor))
    filled = {}
    for key, tensor in tensors.items():
        side = 0 if ".lora_A." in key else 1
        missing = list(tensor.shape)
        missing[side] = ranks[key.partition(".")[0]] - missing[side]
        filled[key] = torch.cat([tensor, tensor.new_zeros(missing)], dim=side)
    return filled


def _kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's keys, with one alpha for all layers, so that loaders cannot confuse the alphas of different layers.

    The update is (alpha / rank) up down: `up` is rescaled to compensate for the factor.
    """
    alpha = max(len(tensor) for key, tensor in tensors.items() if ".lora_A." in key)
    spelt = {}
    for key, tensor in tensors.items():
        stem, _, part = key.partition(".lora_")
        if part == "A.weight":
            spelt[f"{stem}.lora_down.weight"] = tensor
            spelt[f"{stem}.alpha"] = torch.tensor(float(alpha), dtype=tensor.dtype)
        else:
            spelt[f"{stem}.lora_up.weight"] = tensor * (tensor.shape[1] / alpha)
    return spelt
