"""Devices, precision and processes, handled by accelerate."""

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn

from randlora_vision.training.harness.options import TrainingOptions


def make_accelerator(options: TrainingOptions, unused_parameters: bool = False) -> Accelerator:
    """Return the accelerator for these options.

    With `unused_parameters`, distributed training finds the parameters that the loss does not depend on at
    every step, and does not wait for their gradients.

    Raises ValueError when several processes were started but accelerate does not connect them: each would
    train alone and write to the same folder.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
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
    return accelerator


def prepare_sharding(accelerator: Accelerator, module: nn.Module, options: TrainingOptions, checkpoints: bool) -> None:
    """Configure FSDP or DeepSpeed for `module`; raise ValueError when it cannot train it."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if checkpoints:
        raise ValueError(f"--checkpoint-every and --resume are not supported with {kind.value}: start without them")
    if kind == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size
        return
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None:
        raise ValueError("FSDP: set fsdp_auto_wrap_policy: NO_WRAP, because evaluation calls parts of the model")
    scalars = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim == 0}
    trained = [name for name, parameter in scalars.items() if parameter.requires_grad]
    if trained:
        raise ValueError(f"FSDP cannot train a scalar ({trained[0]}): start without --train-logit-scale")
    plugin.ignored_modules = [nn.ParameterList(scalars.values())]


def require_all_gradients(accelerator: Accelerator, names: Mapping[nn.Parameter, str]) -> None:
    """Raise ValueError when processes would wait for the gradient of a parameter the loss does not depend on."""
    handler = accelerator.ddp_handler
    if accelerator.num_processes == 1 or (handler is not None and handler.find_unused_parameters):
        return
    without = [name for parameter, name in names.items() if parameter.grad is None]
    if without:
        raise ValueError(
            f"no gradient reaches {', '.join(without[:3])}{' and others' if without[3:] else ''}: with several "
            "processes, the loss must depend on every trained parameter; leave them out, or train with one process"
        )
