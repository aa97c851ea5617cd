"""Adapter files of a whole pipeline: one .safetensors for the denoiser and the text encoders trained with it."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from randlora_vision import InjectionReport, delete_adapter, set_scale
from randlora_vision.adapters import checkpoint
from randlora_vision.adapters import peft_folder as peft_format
from randlora_vision.files import adapter_file as fileformat
from randlora_vision.files import bundle
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.injection.plan import AdapterPlan
from randlora_vision.integrations._download import ADAPTER_FILE, download
from randlora_vision.integrations.pipelines.components import DENOISERS, adapted, components, refuse_offloaded

# What a file holds for one part, in the terms of the model that it is to go into.
_Content = Callable[[nn.Module], AdapterFile]


def save_adapter(pipe: Any, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter of every part of a pipeline that has it to one file.

    Args:
        pipe: The pipeline.
        path: A name ending in ``.safetensors``; missing folders are made. The file appears whole or not at all.
        adapter_name: Which adapter.

    Returns:
        The path. An adapter of the denoiser alone is written as ``randlora_vision.save_adapter(pipe.unet, path)``
        writes it, and that function's counterpart loads it.

    Raises:
        ValueError: If no part has the adapter or the name does not end in ``.safetensors``.
    """
    target = checkpoint.target_file(path)
    parts = {name: checkpoint.packed(model, adapter_name) for name, model in adapted(pipe, adapter_name).items()}
    alone = next(iter(parts))
    if len(parts) == 1 and alone in DENOISERS:
        fileformat.write(target, *parts[alone])
    else:
        bundle.write(target, parts)
    return target


def load_adapter(
    pipe: Any,
    source: str | os.PathLike[str],
    adapter_name: str = "default",
    scale: float = 1.0,
    *,
    component: str | None = None,
    trainable: bool = False,
) -> dict[str, InjectionReport]:
    """Add the adapter in a file to a pipeline. Everything is checked before the pipeline is touched.

    It joins the RandLoRA adapters that are active, and diffusers' own (``load_lora_weights``), before or after it.

    Args:
        pipe: A pipeline of diffusers.
        source: A file that `save_adapter` or ``randlora_vision.save_adapter`` wrote; a folder with one such file, or
            one that PEFT wrote for its RandLora; or a repository of the Hugging Face Hub (``"owner/name"``), of which
            ``adapter.safetensors`` is downloaded, or ``"owner/name/file.safetensors"``.
        adapter_name: Its name in this pipeline.
        scale: Multiplies its update: 1 is as trained.
        component: Where a file of one adapter goes (``"text_encoder_2"``). Without it: into the denoiser, or into the
            one part that it fits.
        trainable: True to train it further.

    Returns:
        What was adapted, by component.

    Raises:
        FileNotFoundError: If there is no such file, or the Hub cannot be reached or does not have it.
        ValueError: If the file is no adapter or damaged, does not fit the pipeline or fits several of its parts, or a
            part is offloaded layer by layer. The pipeline is untouched then.
    """
    parts, path = components(pipe), _local(source)
    chosen = _place(parts, _read(path), adapter_name, path, component)
    reports: dict[str, InjectionReport] = {}
    try:
        for name, (plan, content) in chosen.items():
            reports[name] = checkpoint.install(plan, content, trainable)
            set_scale(plan.model, scale, adapter_name)
    except BaseException:
        for name in reports:
            delete_adapter(chosen[name][0].model, adapter_name)
        raise
    return reports


def _local(source: str | os.PathLike[str]) -> Path:
    """The file or PEFT folder that `source` means, downloaded where it is no path."""
    path = Path(source)
    if path.is_dir():
        if (path / peft_format.CONFIG_FILE).exists():
            return path
        found = sorted(path.glob("*.safetensors"))
        if path / ADAPTER_FILE in found:
            return path / ADAPTER_FILE
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise FileNotFoundError(f"{str(source)!r} must hold one adapter (.safetensors), it holds: {names}")
        return found[0]
    if path.exists():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:/([\w./-]+\.safetensors))?", str(source))
    if match is None or match[2] is None and path.suffix == ".safetensors":
        raise FileNotFoundError(f"no adapter file {str(source)!r}")
    return download(match[1], match[2] or ADAPTER_FILE)


def _read(path: Path) -> dict[str, _Content]:
    """Part -> its content; "" for an adapter that names no part."""
    if path.is_dir():
        return {"": peft_format.read(path).fit}
    return {part: _as_is(content) for part, content in bundle.read(path).items()}


def _as_is(content: AdapterFile) -> _Content:
    return lambda model: content


def _place(
    parts: Mapping[str, nn.Module],
    contents: Mapping[str, _Content],
    adapter_name: str,
    path: Path,
    component: str | None,
) -> dict[str, tuple[AdapterPlan, AdapterFile]]:
    """Part of the pipeline -> the plan for the model there and what goes into it."""
    if component is not None and len(contents) > 1:
        raise ValueError(f"{path} holds adapters of {', '.join(contents)}: it takes no component={component!r}")
    wanted = {component or part: content for part, content in contents.items()}
    for part in wanted:
        if part and part not in parts:
            raise ValueError(f"{path} is for {part!r}, this pipeline has: {', '.join(parts)}")
    if "" in wanted:
        return _home(parts, wanted[""], adapter_name, path)
    refuse_offloaded({part: parts[part] for part in wanted}, "load an adapter")
    found = {part: content(parts[part]) for part, content in wanted.items()}
    return {
        part: (checkpoint.plan_for(parts[part], content, adapter_name, f"{path} ({part})"), content)
        for part, content in found.items()
    }


def _home(
    parts: Mapping[str, nn.Module], read: _Content, adapter_name: str, path: Path
) -> dict[str, tuple[AdapterPlan, AdapterFile]]:
    """The part that an adapter without a name of one belongs to: the denoiser if it fits, else the only fit."""
    problems: dict[str, str] = {}
    fits: dict[str, tuple[AdapterPlan, AdapterFile]] = {}
    for part, model in parts.items():
        try:
            content = read(model)
            fits[part] = checkpoint.plan_for(model, content, adapter_name, path), content
        except ValueError as error:
            problems[part] = str(error)
            continue
        if part in DENOISERS:
            fits = {part: fits[part]}
            break
    if len(fits) > 1:
        raise ValueError(f"{path} fits {', '.join(fits)}: say which with component={next(iter(fits))!r}")
    if not fits:
        raise ValueError(problems[next(iter(parts))] if parts else f"{path}: the pipeline has no models")
    refuse_offloaded({part: parts[part] for part in fits}, "load an adapter")
    return fits
