"""The bytes of the tensors that exist at once: what a device would have to hold, counted without one.

The resident memory of a process does not show it: weights that are read from safetensors files are mapped, and count
from their first use; freed memory stays with the allocator.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that take part in operations within the block, until they are freed.

    `peak` is the most that there were since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a packed weight: its own operations are counted
        result = func(*args, **(kwargs or {}))
        self.see(tree_leaves((args, kwargs, result)))
        return result

    def see(self, values: Iterable[Any]) -> None:
        """Count tensors that took part in no operation yet, such as the weights of a model that was just loaded."""
        for value in values:
            if type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta":
                storage = value.untyped_storage()
                if id(storage) not in self._known:
                    self._known.add(id(storage))
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count
