"""Copying the values of an adapter file into an adapter that a model already has, to train it further."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import nn

from randlora_vision.adapters.checkpoint import own_adapter
from randlora_vision.bases import get_bases
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.claims import check_bases
from randlora_vision.names import listing


def refill(model: nn.Module, content: AdapterFile, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Copy the content of an adapter file, which was read from `path`, into the adapter of that name.

    Raises:
        ValueError: Unless both have the same targets, ranks, alphas, bases and modules trained in full. The adapter is
            then left unchanged.
    """
    checked_refill(model, content, path, adapter_name)()


def checked_refill(
    model: nn.Module, content: AdapterFile, path: str | os.PathLike[str], adapter_name: str = "default"
) -> Callable[[], None]:
    """Return the function that does what `refill` does; raises as it does, before anything is changed."""
    adapter, tensors, saved = own_adapter(model, adapter_name)
    where = f"{path} does not fit the adapter of this {type(model).__name__}"
    have, want = (
        {target.name: (target.shape, target.rank, target.alpha) for target in targets}
        for targets in (adapter.targets, content.targets)
    )
    _compare(have, want, where)
    shapes, wanted = ({name: tuple(t.shape) for name, t in held.items()} for held in (saved, content.saved))
    _compare(shapes, wanted, where)
    if content.spec != adapter.spec:
        raise ValueError(f"{where}: its bases are {content.spec}, those of the adapter {adapter.spec}")
    check_bases(path, content.bases_checksum, get_bases(adapter.spec))

    @torch.no_grad()
    def copy() -> None:
        for name, own in tensors.items():
            for tensor, value in zip(own, content.trained[name], strict=True):
                tensor.copy_(value)
        for name, whole in saved.items():
            whole.copy_(content.saved[name])

    return copy


def _compare(have: Mapping[str, object], want: Mapping[str, object], where: str) -> None:
    """Raise ValueError, starting with `where`, unless an adapter has exactly what a file holds."""
    for only, what in ((want.keys() - have.keys(), "file's"), (have.keys() - want.keys(), "adapter's")):
        if only:
            raise ValueError(
                f"{where}: {len(only)} of the {what} targets are not in the other ({listing(sorted(only), 3)})"
            )
    for name, expected in want.items():
        if have[name] != expected:
            raise ValueError(f"{where}: {name} is {have[name]} in the adapter and {expected} in the file")
