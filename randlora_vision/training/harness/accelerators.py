"""Devices, precision and processes, handled by accelerate."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn

from randlora_vision.names import listing
from randlora_vision.training.harness.optim import PRODIGY
from randlora_vision.training.harness.options import TrainingOptions
from randlora_vision.training.harness.progress import wrapped


class _WrappingAccelerator(Accelerator):
    """An accelerator whose lines are broken at spaces on a terminal; in files, they stay whole."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first process."""
        if sys.stdout.isatty():
            args = tuple(wrapped(str(part), shutil.get_terminal_size().columns) for part in args)
        super().print(*args, **kwargs)


def make_accelerator(options: TrainingOptions, unused_parameters: bool = False) -> Accelerator:
    """Return the accelerator for these options.

    With `unused_parameters`, distributed training finds the parameters that the loss does not depend on at
    every step, and does not wait for their gradients.

    Raises ValueError when several processes were started but accelerate does not connect them: each would
    train alone and write to the same folder.
    """
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ValueError("accelerate ignores DeepSpeed with ACCELERATE_USE_CPU: set DS_ACCELERATOR=cpu instead")
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)]
    if deepspeed and os.environ.get("DS_ACCELERATOR") == "cpu":
        handlers.append(InitProcessGroupKwargs(backend="gloo"))  # accelerate starts no processes without a backend
    accelerator = _WrappingAccelerator(
        mixed_precision=options.mixed_precision,
        kwargs_handlers=handlers,
        # Not synchronised with the end of the data: a task that joins batches reaches it before it computes.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}: "
            "start CPU processes with the environment variable ACCELERATE_USE_CPU=true"
        )
    _shard_on_cpus(accelerator)
    return accelerator


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """Turn on FSDP for CPU processes: accelerate reads its settings but ignores them where it finds no GPUs."""
    if accelerator.distributed_type != DistributedType.MULTI_CPU or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    state = accelerator.state
    state.fsdp_plugin = plugin
    for shared in (state, PartialState()):
        shared.distributed_type = DistributedType.FSDP
        shared.device = torch.device("cpu")  # FSDP 1 takes accelerate's cpu:0 for another device


def prepare_sharding(
    accelerator: Accelerator, module: nn.Module, options: TrainingOptions, checkpoints: bool = False
) -> None:
    """Configure FSDP or DeepSpeed for `module`; raise ValueError when it cannot train it, or write `checkpoints`."""
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if sharded and options.optimizer == PRODIGY:
        raise ValueError("--optimizer prodigy measures whole parameters: start without FSDP and DeepSpeed")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "ZeRO 3 of DeepSpeed is not supported: evaluation calls parts of the model, whose weights are "
                "then on other processes: set zero_stage: 2, or use FSDP"
            )
        if checkpoints:
            raise ValueError("--checkpoint-every and --resume are not supported with DeepSpeed: use FSDP for them")
        if options.ema_decay:
            raise ValueError("--ema-decay is not supported with DeepSpeed, which hides its parameters: use FSDP")
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": options.batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_clipping": options.max_grad_norm,
        }
        for parameter in module.parameters():
            if parameter.ndim == 0:  # DeepSpeed cannot broadcast scalars, and leaves out what has this attribute
                parameter.ds_optim_param = True  # type: ignore[attr-defined]
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None:
        raise ValueError("FSDP: set fsdp_auto_wrap_policy: NO_WRAP, because evaluation calls parts of the model")
    plugin.use_orig_params = None if accelerator.is_fsdp2 else True  # frozen and trained ones share a flat one
    scalars = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim == 0}
    trained = [name for name, parameter in scalars.items() if parameter.requires_grad]
    if trained:
        raise ValueError(f"FSDP cannot train a scalar ({trained[0]}): start without --train-logit-scale")
    plugin.ignored_modules = [nn.ParameterList(scalars.values())]


def require_all_gradients(accelerator: Accelerator, names: Mapping[nn.Parameter, str]) -> None:
    """Raise ValueError when processes would wait for the gradient of a parameter the loss does not depend on."""
    handler = accelerator.ddp_handler
    waiting = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator.num_processes == 1 or not waiting or (handler is not None and handler.find_unused_parameters):
        return
    without = [name for parameter, name in names.items() if parameter.grad is None]
    if without:
        raise ValueError(
            f"no gradient reaches {listing(without, 3)}: with several "
            "processes, the loss must depend on every trained parameter; leave them out, or train with one process"
        )
