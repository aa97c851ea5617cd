"""Tensors kept on disk under a hash of everything that they were computed from."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora_vision.files.atomic import replacing
from randlora_vision.files.untrusted import read_tensors

_SAMPLE = 1024  # numbers of each weight that identify it: hashing whole text encoders would take longer than using them

Tensors = Mapping[str, Tensor]


class Kept:
    """A folder of safetensors files; a file is written completely or not at all, so several runs can share it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __call__(self, key: Iterable[object], make: Callable[[], Tensors]) -> dict[str, Tensor]:
        """Return the tensors of `key`, on the CPU, from `make()` if no file has them."""
        path = self.folder / f"{hashlib.sha256(repr(list(key)).encode()).hexdigest()}.safetensors"
        if path.exists():
            return read_tensors(path)[0]
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        with replacing(path) as temporary:
            save_file(made, temporary)
        return made


def hash_of(tensor: Tensor) -> str:
    """Return the SHA-256 of the type, the shape and the numbers of a tensor."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode() + content).hexdigest()


@torch.no_grad()
def identity(parts: Iterable[Any]) -> str:
    """Return a hash of modules, by up to 1024 numbers spread over each weight, and of tokenizers; None is skipped."""
    known = hashlib.sha256()
    for part in parts:
        known.update(type(part).__name__.encode())
        if isinstance(part, nn.Module):
            for name, tensor in part.state_dict().items():
                flat = tensor.detach().flatten()
                sample = flat[:: max(1, len(flat) // _SAMPLE)].float()
                known.update(repr((name, tuple(tensor.shape), tensor.dtype, hash_of(sample))).encode())
        elif part is not None:
            known.update(repr((len(part), getattr(part, "chat_template", None))).encode())
    return known.hexdigest()
