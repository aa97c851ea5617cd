"""Adapter files for whole pipelines: one .safetensors file for the denoiser and the text encoders trained with it."""

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from randlora_vision import InjectionReport, delete_adapter, set_scale
from randlora_vision.adapters import checkpoint, peft_folder
from randlora_vision.files import adapter_file, bundle
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.injection.plan import AdapterPlan
from randlora_vision.integrations._download import ADAPTER_FILE, download
from randlora_vision.integrations.pipelines.components import (
    DENOISERS,
    absent_components,
    adapted,
    components,
    refuse_offloaded,
)
from randlora_vision.names import listing

_LOG = logging.getLogger(__name__)
# Returns the content of a file for one component, given the model that it is loaded into.
_Content = Callable[[nn.Module], AdapterFile]


def save_adapter(pipe: Any, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write an adapter to one file, from all components of a pipeline that have it.

    Args:
        pipe: The pipeline.
        path: A name ending in ``.safetensors``; missing folders are created. The file is written completely or not at
            all.
        adapter_name: Name of the adapter.

    Returns:
        The path. If only the denoiser has the adapter, the file is the same as that of
        ``randlora_vision.save_adapter(pipe.unet, path)`` and ``randlora_vision.load_adapter`` can read it.

    Raises:
        ValueError: If no component has the adapter or the name does not end in ``.safetensors``.
    """
    target = checkpoint.target_file(path)
    parts = {name: checkpoint.packed(model, adapter_name) for name, model in adapted(pipe, adapter_name).items()}
    alone = next(iter(parts))
    if len(parts) == 1 and alone in DENOISERS:
        adapter_file.write(target, *parts[alone])
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
    """Add the adapter in a file to a pipeline. Everything is checked before the pipeline is changed.

    The adapter is active in addition to other active RandLoRA adapters and to diffusers' own LoRA
    (``load_lora_weights``), which may be loaded before or after it.

    Args:
        pipe: A diffusers pipeline.
        source: A file written by `save_adapter` or ``randlora_vision.save_adapter``; a folder with one such file, or
            one written by PEFT for its RandLora; or a repository on the Hugging Face Hub: ``"owner/name"`` downloads
            ``adapter.safetensors``, ``"owner/name/file.safetensors"`` another file.
        adapter_name: Name of the adapter in this pipeline.
        scale: Factor of its update: 1 is as trained.
        component: The only component to load: that part of a file with several, or where a file with one adapter is
            loaded into (``"text_encoder_2"``). By default, every part is loaded into its component, except those that
            the pipeline was loaded without (``text_encoder=None``), and an adapter of no named component into the
            denoiser, or else into the only component that it fits.
        trainable: True to train the adapter further.

    Returns:
        The report of what was adapted, by component. If parts of the file were left out, `warnings` names them, and
        a line is logged.

    Raises:
        FileNotFoundError: If there is no such file, or the Hub cannot be reached or does not have it.
        ValueError: If the file is damaged or not an adapter file, does not fit the pipeline or fits several of its
            components, or a component is offloaded layer by layer. The pipeline is then unchanged.
    """
    parts, (held, path) = components(pipe), read_parts(source)
    contents, note = _wanted(pipe, parts, held, path, component)
    chosen = _place(parts, contents, adapter_name, path)
    reports: dict[str, InjectionReport] = {}
    try:
        for name, (plan, content) in chosen.items():
            reports[name] = checkpoint.install(plan, content, trainable)
            set_scale(plan.model, scale, adapter_name)
    except BaseException:
        for name in reports:
            delete_adapter(chosen[name][0].model, adapter_name)
        raise
    if note:
        _LOG.warning(note)
        reports = {name: replace(report, warnings=(*report.warnings, note)) for name, report in reports.items()}
    return reports


def read_parts(source: str | os.PathLike[str]) -> tuple[dict[str, _Content], Path]:
    """Return component -> its content, and the file that `source` of `load_adapter` is; "" names no component."""
    path = _local(source)
    return _read(path), path


def _local(source: str | os.PathLike[str]) -> Path:
    """The file or PEFT folder for `source`, downloaded if `source` is not a path."""
    path = Path(source)
    if path.is_dir():
        if (path / peft_folder.CONFIG_FILE).exists():
            return path
        found = sorted(path.glob("*.safetensors"))
        if path / ADAPTER_FILE in found:
            return path / ADAPTER_FILE
        if len(found) != 1:
            names = listing(file.name for file in found) or "none"
            raise FileNotFoundError(f"{str(source)!r} must hold exactly one adapter (.safetensors); it holds: {names}")
        return found[0]
    if path.exists():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:/([\w./-]+\.safetensors))?", str(source))
    if match is None or match[2] is None and path.suffix == ".safetensors":
        raise FileNotFoundError(f"no adapter file {str(source)!r}")
    return download(match[1], match[2] or ADAPTER_FILE)


def _read(path: Path) -> dict[str, _Content]:
    """Component -> its content; the key is "" for an adapter that names no component."""
    if path.is_dir():
        return {"": peft_folder.read(path).fit}
    return {part: _as_is(content) for part, content in bundle.read(path).items()}


def _as_is(content: AdapterFile) -> _Content:
    return lambda model: content


def _wanted(
    pipe: Any, parts: Mapping[str, nn.Module], contents: Mapping[str, _Content], path: Path, component: str | None
) -> tuple[dict[str, _Content], str]:
    """The contents to load, by component of the pipeline ("" if the file names none), and a note of the others."""
    absent = absent_components(pipe)
    if component is None:
        wanted = {part: content for part, content in contents.items() if part not in absent}
        why = f"this {type(pipe).__name__} was loaded without"
    elif len(contents) == 1:
        wanted, why = {component: next(iter(contents.values()))}, ""
    elif component not in contents:
        raise ValueError(f"{path} holds adapters for {', '.join(contents)}, but none for component={component!r}")
    else:
        wanted, why = {component: contents[component]}, f"component={component!r} leaves out"
    for part in wanted:
        if part and part not in parts:
            raise ValueError(f"{path} is for {part!r}, but this pipeline has: {', '.join(parts)}")
    if not wanted:
        raise ValueError(f"{path} is for {', '.join(contents)}, which this {type(pipe).__name__} was loaded without")
    left_out = [part for part in contents if part not in wanted] if why else []
    return wanted, f"{path}: {why} {', '.join(left_out)}" if left_out else ""


def _place(
    parts: Mapping[str, nn.Module], wanted: Mapping[str, _Content], adapter_name: str, path: Path
) -> dict[str, tuple[AdapterPlan, AdapterFile]]:
    """Component of the pipeline -> the plan for its model, and the content to install."""
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
    """The component for an adapter that does not name one: the denoiser if it fits, else the only one that fits."""
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
        raise ValueError(f"{path} fits {', '.join(fits)}: choose one with component={next(iter(fits))!r}")
    if not fits:
        raise ValueError(problems[next(iter(parts))] if parts else f"{path}: the pipeline has no models")
    refuse_offloaded({part: parts[part] for part in fits}, "load an adapter")
    return fits
