"""The training batches of a run: common ones that accelerate shares out, or a process's own ones from its shards."""

from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from randlora_vision.training.data.batches import Pictures, training_batches
from randlora_vision.training.harness.options import Training
from randlora_vision.training.harness.streaming import StreamedBatches
from randlora_vision.training.harness.task import OwnBatches


def training_loader(images: Pictures, training: Training, accelerator: Accelerator) -> DataLoader[Any] | OwnBatches:
    """Return the batches of the training `images`."""
    if images.stream is None:
        count = training.batches(accelerator.num_processes)
        return training_batches(images, training.batch_size, count, training.seed, training.workers)
    return StreamedBatches(
        stream=images.stream,
        reader=images,
        batch_size=training.batch_size,
        batches=training.batches(1),
        epoch_images=training.epoch_images or 0,  # the options require it
        seed=training.seed,
        workers=training.workers,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
