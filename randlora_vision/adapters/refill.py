"""Copying the values of an adapter file into an adapter that a model already has, to train it further."""

from __future__ import annotations

import os

import torch
from torch import nn

from randlora_vision.adapters.checkpoint import compare, own_adapter
from randlora_vision.bases import get_bases
from randlora_vision.files.adapter_file import AdapterFile


def refill(model: nn.Module, content: AdapterFile, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Copy the content of an adapter file, which was read from `path`, into the adapter of that name.

    Raises:
        ValueError: Unless both have the same targets, ranks, alphas, bases and modules trained in full. The adapter is
            then left unchanged.
    """
    adapter, tensors, saved = own_adapter(model, adapter_name)
    where = f"{path} does not fit the adapter of this {type(model).__name__}"
    have, want = (
        {target.name: (target.shape, target.rank, target.alpha) for target in targets}
        for targets in (adapter.targets, content.targets)
    )
    compare(have, want, where)
    shapes, stored = ({name: tuple(t.shape) for name, t in held.items()} for held in (saved, content.saved))
    compare(shapes, stored, where)
    if content.spec != adapter.spec or content.bases_sha256 != get_bases(adapter.spec).sha256:
        raise ValueError(f"{where}: its bases are {content.spec}, those of the adapter {adapter.spec}")
    with torch.no_grad():
        for name, own in tensors.items():
            for tensor, value in zip(own, content.trained[name], strict=True):
                tensor.copy_(value)
        for name, whole in saved.items():
            whole.copy_(content.saved[name])
