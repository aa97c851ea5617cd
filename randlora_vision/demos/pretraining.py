"""Shared code of the pretrained demo models: caching on disk, and training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from randlora_vision.files.atomic import fingerprint, replacing_folder
from randlora_vision.files.cache import cache_root
from randlora_vision.training.data.batches import training_batches
from randlora_vision.training.data.labelled import Batch, LabelledImages
from randlora_vision.training.harness.optim import make_optimizer
from randlora_vision.training.harness.schedules import Schedule, warmup_schedule


@dataclass(frozen=True)
class Pretraining:
    """Settings for pretraining a demo model."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 15
    seed: int = 0


def cached_folder(
    name: str, settings: dict[str, Any], fill: Callable[[Path], None], cache_dir: str | None = None
) -> Path:
    """Return the cached folder that `fill` writes, calling it first if the folder does not exist.

    The name of the folder ends with a hash of `settings`, so changed settings use a different folder. The folder is
    filled under a temporary name and then renamed.
    """
    root = cache_root(cache_dir)
    folder = root / f"{name}-{fingerprint(settings)}"
    if folder.is_dir():
        return folder
    print(f"pretraining {name} for the demo (once; cached in {folder})", flush=True)
    try:
        with replacing_folder(folder) as unfinished:
            fill(unfinished)
    except OSError:
        if not folder.is_dir():  # another process may have finished the same model first
            raise
    return folder


def teach(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Batch], Tensor],
    data: LabelledImages,
    how: Pretraining,
) -> None:
    """Train `parameters` on the CPU in float32."""
    trained = list(parameters)
    optimizer = make_optimizer("adamw", trained, how.lr, how.weight_decay)
    schedule = warmup_schedule(optimizer, Schedule(how.steps, how.warmup))
    batches = training_batches(data, how.batch_size, how.steps, how.seed, workers=0)
    for batch in tqdm(batches, desc="pretraining", unit="step"):
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
