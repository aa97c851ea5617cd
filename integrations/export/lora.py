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

import torch
from torch import Tensor

from randlora_vision.integrations.export.formats import Diffusers, Format, Kohya, Lycoris, Whole
from randlora_vision.integrations.export.low_rank import ExportReport, Factors, LayerError, approximate
from randlora_vision.integrations.export.peft_lora import Peft
from randlora_vision.integrations.export.updates import Update, components, trained_in_full, updates

FORMATS: dict[str, Format] = {writer.name: writer for writer in (Diffusers(), Kohya(), Peft(), Lycoris())}
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

    - ``diffusers``: ``pipe.load_lora_weights``, and ComfyUI for SD3, Flux, AuraFlow, PixArt, Qwen-Image, Z-Image and
      CLIP text encoders.
    - ``kohya``: ComfyUI for the U-Nets of SD 1, 2 and XL, SD3, Flux, Flux.2, Chroma, Lumina 2, Wan, Qwen-Image and CLIP
      text encoders; sd-scripts (up to Lumina 2) and musubi-tuner (Flux.2, Wan, Qwen-Image, HunyuanVideo, Z-Image) for
      the layers in these models' blocks.
    - ``peft``: ``PeftModel.from_pretrained``, for any single model. PEFT wraps layers, so the update has no effect
      where a host reads ``module.weight`` itself.
    - ``lycoris``: ComfyUI for U-Nets and CLIP text encoders; LyCORIS's ``create_lycoris_from_weights`` for other
      models.

    Args:
        model_or_pipe: A model with adapters, or a diffusers pipeline with such components.
        path: A ``.safetensors`` file; for ``peft``, a folder.
        rank: Rank of every layer, at most its narrow side. Give either this or `energy`.
        energy: Share of every update's squared Frobenius norm to keep; the smallest sufficient rank is used
            (``diffusers`` needs one rank for all layers of a component: smaller ranks are padded with zeros).
        format: ``diffusers``, ``kohya``, ``peft``, or ``lycoris``, which holds complete updates and takes neither rank
            nor energy. Who reads which models' files is below.
        adapter_name: Name of the adapter; None means all merged or active ones. Their current scales are applied.
        progress: Called after each layer with (layers done, total layers).

    Returns:
        The report, with the relative error of every layer and of all layers together.

    Raises:
        ValueError: If an argument is out of range, there is no such adapter, or the format cannot hold an adapted
            layer or the modules trained in full (``modules_to_save``, which only ``peft`` supports); the message names
            the formats that can.
    """
    writer = FORMATS.get(format)
    if writer is None:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    choice, target = writer.choice(rank, energy), Path(path)
    writer.check_path(target)
    found, whole = updates(model_or_pipe, adapter_name), trained_in_full(model_or_pipe, adapter_name)
    try:
        writer.check(model_or_pipe, found, whole)
    except ValueError as error:
        others = [name for name, other in FORMATS.items() if _fits(other, model_or_pipe, found, whole)]
        instead = f"use the format {' or '.join(map(repr, others))}, " if others else ""
        raise ValueError(f"{error}: {instead}save the merged model, or train without them (exclude_modules)") from None
    pieces = writer.pieces(model_or_pipe, found)
    contents: dict[str, Tensor | Factors] = {}
    layers: list[LayerError] = []
    for done, piece in enumerate(pieces, start=1):
        if piece.key in contents:
            raise ValueError(f"the format {format!r} has one name, {piece.key!r}, for two of the adapted layers")
        contents[piece.key], layer = approximate(piece.name, piece.delta(), choice)
        layers.append(layer)
        if progress is not None:
            progress(done, len(pieces))
    report = ExportReport(format, str(target), choice, tuple(layers))
    writer.write(target, components(model_or_pipe)[found[0].component], contents, whole, report)
    return report


def _fits(writer: Format, host: Any, found: list[Update], whole: Whole) -> bool:
    try:
        writer.check(host, found, whole)
    except ValueError:
        return False
    return True
