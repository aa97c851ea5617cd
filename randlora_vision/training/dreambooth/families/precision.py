"""The precision of the VAEs."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, because VAEs overflow in fp16."""
    with torch.autocast(device.type, enabled=False):
        yield
