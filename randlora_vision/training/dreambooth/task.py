"""The task that trains a pipeline on a subject, and its training data."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from randlora_vision.training.dreambooth.batches import (
    CachedLatents,
    CaptionedPixels,
    DiffusionBatch,
    Item,
    Prompts,
    collate,
    diffusion_batches,
)
from randlora_vision.training.dreambooth.buckets import Size
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import PipelineAdaptation, trained_components
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.dreambooth.subject import Subject, make_items
from randlora_vision.training.harness.seeding import seed_everything
from randlora_vision.training.harness.task import AdaptedTask, batches_consumed

_MEASURED = 16  # images, possibly repeated, at fixed noise: enough to see a trend


@dataclass(frozen=True)
class TrainingSet:
    """The images of the subject and of its class, and the sizes to which they are cropped."""

    subject: Subject
    class_images: Sequence[Path]
    class_prompt: str | None
    buckets: Sequence[Size]

    def record(self) -> dict[str, Any]:
        """Return the record for the run folder."""
        names = [path.name for path in self.class_images]
        return {**self.subject.record(), "class_prompt": self.class_prompt, "class_images": names}

    def __str__(self) -> str:
        kept = f"; {len(self.class_images)} of {self.class_prompt!r}" if self.class_images else ""
        sizes = f"{len(self.buckets)} sizes" if len(self.buckets) > 1 else "{} x {}".format(*self.buckets[0])
        return f"{self.subject}{kept}; {sizes}"


class DreamBoothTask(AdaptedTask):
    """Train with the denoising loss on the subject and its class, and save to one file."""

    measured = "training-image"  # a few images of the subject cannot be split

    def __init__(
        self,
        family: Family,
        adaptation: PipelineAdaptation,
        train: TrainingSet,
        options: DreamBoothOptions,
        processes: int,
        path: Path | None,
    ) -> None:
        super().__init__(adaptation, path)
        training = options.training
        items, texts = make_items(
            train.subject, train.class_images, train.class_prompt, train.buckets, options.subject, training.seed
        )
        pixels = CaptionedPixels(items, options.subject.center_crop)
        cached = options.subject.cache_latents
        self.data = CachedLatents(pixels, family, training.seed) if cached else pixels
        self.family = family
        self.seed = training.seed
        self.text_encoder_lr = options.pipeline.text_encoder_lr
        self.loss = DiffusionLoss(
            family,
            {name: getattr(family.pipe, name) for name in trained_components(family, options)},
            Prompts(family, texts, trained=options.pipeline.train_text_encoder),
            options.subject.prior_loss_weight,
            cached,
        )
        self.batches: DataLoader[DiffusionBatch] = diffusion_batches(
            self.data,
            training.batch_size,
            batches_consumed(training, processes),
            training.seed,
            training.workers,
        )
        self._measured = list(_fixed_batches(items, training.batch_size))

    def own_lr(self) -> dict[nn.Parameter, float]:
        """Return the learning rates that differ from the default, by parameter."""
        if self.text_encoder_lr is None:
            return {}
        texts = [part for name, part in self.loss.parts.items() if name != self.family.denoiser_name]
        return {p: self.text_encoder_lr for part in texts for p in part.parameters() if p.requires_grad}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the losses on the subject and on the class, with the same noise at every call."""
        self.loss.eval()
        errors: dict[str, list[float]] = defaultdict(list)
        for number, indices in enumerate(self._measured):
            seed_everything("evaluation", self.seed, number)
            batch = collate([self.data.entry(index) for index in indices])
            name = "prior_loss" if batch["prior"][0] else "loss"
            errors[name] += self.loss.errors(batch).tolist()
        return {name: sum(values) / len(values) for name, values in errors.items()}


def _fixed_batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Return batches of one size and one kind, with the same few images for every seed."""
    batches = []
    for prior in (False, True):
        by_bucket: dict[Size, list[int]] = defaultdict(list)
        chosen = [index for index, item in enumerate(items) if item.prior == prior]
        for index in itertools.islice(itertools.cycle(chosen), _MEASURED):
            by_bucket[items[index].bucket].append(index)
        for indices in by_bucket.values():
            batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches
