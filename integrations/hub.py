"""Adapters on the Hugging Face Hub: one .safetensors file and a model card. No other file is fetched.

    push_to_hub("runs/a/adapter.safetensors", "me/my-adapter", base_model="timm/vit_base_patch16_224", library="timm")
    load_adapter(model, "me/my-adapter")

For diffusers pipelines, use ``integrations.diffusers.load_adapter(pipe, "me/my-adapter")``. Log in as usual for the
Hub: ``hf auth login`` or the environment variable HF_TOKEN.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import randlora_vision
from randlora_vision import InjectionReport
from randlora_vision.errors import reason_of
from randlora_vision.files import bundle
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.integrations._download import ADAPTER_FILE, download, hugging_face_hub
from randlora_vision.names import printable

_LOADING = {
    "timm": (
        "import timm\nfrom randlora_vision.integrations.hub import download\n"
        "from randlora_vision.integrations.timm import load_adapter, num_classes\n\n"
        "path = download({repository!r})\n"
        "model = timm.create_model({base!r}, pretrained=True, num_classes=num_classes(path))\nload_adapter(model, path)"
    ),
    "open_clip": (
        "import open_clip\nfrom randlora_vision.integrations.hub import load_adapter\n\n"
        "model, _, preprocess = open_clip.create_model_and_transforms({base!r})  # with the weights it was trained on\n"
        "load_adapter(model, {repository!r})"
    ),
    "diffusers": (
        "from diffusers import DiffusionPipeline\nfrom randlora_vision.integrations.diffusers import load_adapter\n\n"
        "pipe = DiffusionPipeline.from_pretrained({base!r})\nload_adapter(pipe, {repository!r})"
    ),
    "": (
        "from randlora_vision.integrations.hub import load_adapter\n\n"
        "model = ...  # {base}\nload_adapter(model, {repository!r})"
    ),
}


def load_adapter(
    model: nn.Module,
    repository: str,
    adapter_name: str = "default",
    trainable: bool = False,
    *,
    name: str = ADAPTER_FILE,
    revision: str | None = None,
) -> InjectionReport:
    """Load an adapter file from the Hub, as `randlora_vision.load_adapter` does.

    Args:
        model: The base model.
        repository: ``"owner/name"``, or ``"name"`` for a repository of the current login.
        adapter_name: Name of the adapter in this model.
        trainable: True to train the adapter further.
        name: The file in the repository.
        revision: A branch, tag or commit.

    Raises:
        FileNotFoundError: If the Hub cannot be reached or does not have the file.
        ValueError: Under the conditions of `randlora_vision.load_adapter`.
    """
    return randlora_vision.load_adapter(model, download(repository, name, revision), adapter_name, trainable)


def push_to_hub(
    source: Any,
    repository: str,
    *,
    base_model: str,
    library: str = "",
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    adapter_name: str = "default",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload an adapter with a model card; the repository is created if it does not exist.

    Args:
        source: An adapter file, a model, or a diffusers pipeline with adapters.
        repository: ``"owner/name"``, or ``"name"`` for a repository of the current login.
        base_model: The model that the adapter was trained on, as its library names it, for the card.
        library: ``timm``, ``open_clip`` or ``diffusers``: determines the loading instructions on the card.
        license: The adapter's licence, as the Hub abbreviates it (``apache-2.0``).
        metrics: Measured results, for the card.
        adapter_name: Name of the adapter in the model or pipeline.
        private: Make a new repository private.
        token: Used instead of the token of the current login.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an adapter file, the library is unknown, or the Hub rejects the upload.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ADAPTER_FILE
        if isinstance(source, (str, os.PathLike)):
            if not Path(source).is_file():
                raise FileNotFoundError(f"no adapter file {str(source)!r}")
            shutil.copyfile(source, file)
        elif isinstance(source, nn.Module):
            randlora_vision.save_adapter(source, file, adapter_name)
        else:
            from randlora_vision.integrations import diffusers

            diffusers.save_adapter(source, file, adapter_name)
        repository = full_name(repository, token)
        card = model_card(file, repository, base_model, library, license, metrics)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        return upload(Path(folder), ["README.md", ADAPTER_FILE], repository, "RandLoRA adapter", private, token)


def full_name(repository: str, token: str | None = None) -> str:
    """Return ``"owner/name"``; a name alone is that of a repository of the current login."""
    if "/" in repository:
        return repository
    return f"{hugging_face_hub().HfApi(token=token).whoami()['name']}/{repository}"


def upload(
    folder: Path, names: Sequence[str], repository: str, message: str, private: bool = False, token: str | None = None
) -> str:
    """Upload files of a folder as one commit to a new or existing repository; raise ValueError if it is rejected."""
    api = hugging_face_hub().HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=list(names), commit_message=message
        )
    except (OSError, ValueError) as error:
        reason = printable(reason_of(error))
        raise ValueError(f"the Hugging Face Hub rejected the upload to {repository!r}: {reason}") from None
    return str(commit.commit_url)


def model_card(
    path: str | os.PathLike[str],
    repository: str,
    base_model: str,
    library: str = "",
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Return the README.md for an adapter file: front matter for the Hub, a description, and how to load it.

    Raises:
        ValueError: If the file is not an adapter file or the library is unknown.
    """
    if library not in _LOADING:
        raise ValueError(f"library must be one of {', '.join(name for name in _LOADING if name)}, got {library!r}")
    parts = bundle.read(Path(path))
    front = [
        f"base_model: {json.dumps(base_model)}",
        f"library_name: {library or 'randlora_vision'}",
        *([f"license: {json.dumps(license)}"] if license else []),
        "tags:",
        *(f"- {tag}" for tag in ("randlora", "randlora_vision", "adapter")),
    ]
    lines = ["---", *front, "---", "", f"# {repository.rpartition('/')[2]}", ""]
    lines += [f"A RandLoRA adapter ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987)) for `{base_model}`.", ""]
    lines += ["| part | layers | rank of one base | bases, seed | trained numbers |", "|---|---:|---:|---|---:|"]
    lines += [_row(part, content) for part, content in parts.items()]
    lines += ["", f"One file of {Path(path).stat().st_size:,} bytes; the random bases are made again from the seed."]
    if metrics:
        lines += ["", "## Results", "", "| metric | value |", "|---|---:|"]
        lines += [f"| {name} | {value:g} |" for name, value in metrics.items()]
    code = _LOADING[library].format(repository=repository, base=base_model)
    lines += ["", "## Loading", "", "```python", code, "```", "", "## Configuration", ""]
    for content in parts.values():
        lines += ["```json", json.dumps(content.config.to_dict(), indent=2), "```"]
    return "\n".join(lines) + "\n"


def _row(part: str, content: AdapterFile) -> str:
    numbers = sum(tensor.numel() for pair in content.trained.values() for tensor in pair)
    numbers += sum(tensor.numel() for tensor in content.saved.values())
    ranks = sorted({target.rank for target in content.targets})
    bases = f"{content.spec.kind}, {content.spec.seed}"
    return f"| {part or 'model'} | {len(content.targets)} | {', '.join(map(str, ranks))} | {bases} | {numbers:,} |"
