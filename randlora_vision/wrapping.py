"""A model as it is without the layers that PEFT wraps around others.

PEFT's LoRA, which diffusers' ``load_lora_weights`` injects, renames ``to_q`` to ``to_q.base_layer``. Targets keep
their plain names whatever was wrapped before or is wrapped after.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as `named_modules(remove_duplicate=False)` gives them, without PEFT's layers and their parts."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    while loaded is not None and isinstance(model, loaded.BaseTunerLayer) and hasattr(model, "base_layer"):
        model = model.base_layer
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{path}.{name}" if path else name)


def plain_name(path: str) -> str:
    """The path that a parameter has where PEFT wraps nothing."""
    return path.replace(".base_layer.", ".")
