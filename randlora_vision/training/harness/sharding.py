"""Training state that several processes hold together: gathered for files, distributed again when a run resumes.

The state is the same, under the same names, whether one process holds it or several, and however they share it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from randlora_vision.training.harness.optimizer_state import (
    State,
    optimizer_state,
    packed,
    restore_optimizer,
    to_cpu,
    unpacked,
)


class Replicated:
    """Every process holds everything: one, or several under DistributedDataParallel. All must call every method."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: torch.optim.Optimizer,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.names = names

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all parameters, for reading, while the model is saved or called other than through its forward."""
        yield

    @contextlib.contextmanager
    def whole_gradients(self) -> Iterator[None]:
        """Let every trained parameter that has a gradient on some process have one here."""
        yield

    def keep_whole(self) -> None:
        """As `whole`, from now on."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters on the CPU; of several processes that share them, the first gets them."""
        return {name: to_cpu(parameter) for parameter, name in self.names.items()}

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the trained parameters."""
        for parameter, name in self.names.items():
            parameter.copy_(tensors[name])

    def optimizer_state(self) -> State:
        """Return the state of the optimiser; of several processes that share it, the first gets it."""
        return optimizer_state(self.optimizer, self.names)

    def load_optimizer(self, state: State) -> None:
        """Restore the state of the optimiser; raise ValueError for that of another one."""
        restore_optimizer(self.optimizer, self.names, state)

    def clip_gradients(self, most: float) -> Tensor | None:
        """Clip the gradients to a norm of `most`; return their norm before, a scalar, or None if it is not known."""
        norm: Any = self.accelerator.clip_grad_norm_(list(self.names), most)
        return norm


class FullySharded(Replicated):
    """FSDP of both versions: every process holds a part of the model."""

    _FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the parameters."""
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                yield
        else:
            self.model.unshard()
            yield
            self.model.reshard()

    @contextlib.contextmanager
    def whole_gradients(self) -> Iterator[None]:
        """Gather the gradients of FSDP 1, whose parts are of the model, not of each parameter as in FSDP 2."""
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False, with_grads=True):
                yield
        else:
            yield

    def keep_whole(self) -> None:
        """Gather the parameters for good: what follows does not call the model through its forward."""
        _held.enter_context(self.whole())

    def parameters(self) -> dict[str, Tensor]:
        """Gather the trained parameters."""
        module = self.model.module if isinstance(self.model, FullyShardedDataParallel) else self.model
        with self.whole():
            return {name: to_cpu(p) for name, p in module.named_parameters() if p.requires_grad}

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Distribute the trained parameters."""
        set_model_state_dict(self.model, dict(tensors), options=self._FULL)

    def optimizer_state(self) -> State:
        """Gather the state of the optimiser."""
        content: Any = get_optimizer_state_dict(self.model, self.optimizer, options=self._FULL)
        return packed(content.get("state", {}), content.get("param_groups", []))

    def load_optimizer(self, state: State) -> None:
        """Distribute the state of the optimiser."""
        groups: Any = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        memory = unpacked(state, groups)
        if memory:
            content: Any = {"state": memory, "param_groups": groups}
            set_optimizer_state_dict(self.model, self.optimizer, content, options=self._FULL)
        for own, group in zip(self.optimizer.param_groups, groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})

    def clip_gradients(self, most: float) -> Tensor | None:
        """Clip the gradients to the norm over all processes."""
        if not isinstance(self.model, FullyShardedDataParallel):
            norm: Any = super().clip_gradients(most)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # accelerate's function clips each process by the norm of its part, unless every parameter is trained
        self.accelerator.unscale_gradients()
        return self.model.clip_grad_norm_(most)


class Partitioned(Replicated):
    """DeepSpeed's ZeRO 1 and 2, which leave the parameters whole and clip the gradients themselves."""

    def clip_gradients(self, most: float) -> Tensor | None:
        """Return the norm that DeepSpeed found, if it has one."""
        norm: Any = self.accelerator.clip_grad_norm_(list(self.names), most)
        return None if norm is None else torch.as_tensor(norm)


_held = contextlib.ExitStack()  # until the process ends: FSDP 1 gathers parameters only as a context


def sharing(accelerator: Accelerator) -> type[Replicated]:
    """Return how the processes share the training state."""
    kinds = {DistributedType.FSDP: FullySharded, DistributedType.DEEPSPEED: Partitioned}
    return kinds.get(accelerator.distributed_type, Replicated)
