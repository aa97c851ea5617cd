"""The task that trains a pipeline on a subject, and its training data."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_vision.files.text import as_utf8
from randlora_vision.training.dreambooth.batches import (
    CachedLatents,
    CaptionedPixels,
    Item,
    Items,
    Place,
    Prompts,
    collate,
    diffusion_batches,
    seeded_entry,
)
from randlora_vision.training.dreambooth.buckets import Size
from randlora_vision.training.dreambooth.families import Family, with_image_of
from randlora_vision.training.dreambooth.kept import Kept
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import PipelineAdaptation, trained_components
from randlora_vision.training.dreambooth.options import DreamBoothSettings
from randlora_vision.training.dreambooth.samples import quoted
from randlora_vision.training.dreambooth.subject import Subject, make_items
from randlora_vision.training.harness.optim import Rate
from randlora_vision.training.methods.task import AdaptedTask

Measure = Callable[[], Mapping[str, float]]
_FEWEST_TOKENS = 75  # that a pipeline reads by default
_MEASURED = 16  # images, possibly repeated, at fixed noise: enough to see a trend


@dataclass(frozen=True)
class TrainingSet:
    """The images of the subject and of its class, and the sizes to which they are cropped."""

    subject: Subject
    class_images: Sequence[tuple[Path, str]]
    """Files with their captions."""
    buckets: Sequence[Size]

    def record(self) -> dict[str, Any]:
        """Return the record for the run folder."""
        return {
            **self.subject.record(),
            "class_images": {as_utf8(path.name): caption for path, caption in self.class_images},
        }

    def __str__(self) -> str:
        captions = list(dict.fromkeys(caption for _, caption in self.class_images))
        kept = f"; {len(self.class_images)} of {quoted(captions)}" if captions else ""
        sizes = f"{len(self.buckets)} sizes" if len(self.buckets) > 1 else "{} x {}".format(*self.buckets[0])
        return f"{self.subject}{kept}; {sizes}"


@dataclass(frozen=True)
class Material:
    """The items of the training with their prompts."""

    items: Sequence[Item]
    prompts: Prompts
    kept: Kept | None
    note: str
    """A note on a prompt whose end is not read, if there is one."""


def make_material(family: Family, train: TrainingSet, settings: DreamBoothSettings) -> Material:
    """Return the items and their prompts, which are encoded here unless text encoders are trained."""
    items, texts = make_items(
        train.subject,
        train.class_images,
        train.buckets,
        settings.subject,
        settings.training.seed,
        family.takes,
        family.sees,
    )
    kept = Kept(Path(settings.subject.cache_to_disk)) if settings.subject.cache_to_disk else None
    prompts = Prompts(family, texts, trained=settings.pipeline.train_text_encoder, kept=kept)
    return Material(items, prompts, kept, cut_note(family, texts, kept))


def cut_note(family: Family, texts: Sequence[str], kept: Kept | None = None) -> str:
    """Return a note if the longest text is encoded as it is without its last word, else an empty string."""
    longest = max(texts, key=len)
    shorter = longest.rpartition(" ")[0]
    tokens = family.max_sequence_length or _FEWEST_TOKENS
    if not shorter or len(longest.encode()) < tokens:  # a token has a byte or more
        return ""
    pair = Prompts(family, [longest, with_image_of(longest, shorter)], trained=False, kept=kept).cached
    assert pair is not None
    if not all(torch.equal(*encodings) for encodings in pair.values()):
        return ""
    raised = ", or raise --max-sequence-length" if "max_sequence_length" in family.text_options else ""
    return (
        f"note: the text encoders do not read the end of long prompts such as '{longest[:60]}...': shorten them{raised}"
    )


def make_task(
    family: Family,
    adaptation: PipelineAdaptation,
    material: Material,
    settings: DreamBoothSettings,
    processes: int,
    path: Path | None,
    measures: Sequence[Measure] = (),
) -> AdaptedTask:
    """Return the task of training with the denoising loss on the subject and its class; `path` is its file.

    An evaluation consists of the losses at fixed noise and of `measures`, which only the writing process takes.
    """
    training, text_encoder_lr = settings.training, settings.pipeline.text_encoder_lr
    items, prompts = material.items, material.prompts
    pixels = CaptionedPixels(items, settings.subject.center_crop, family.takes)
    cached = settings.subject.cache_latents
    data = CachedLatents(pixels, family, training.seed, material.kept) if cached else pixels
    parts: dict[str, nn.Module] = {name: getattr(family.pipe, name) for name in trained_components(family, settings)}
    loss = DiffusionLoss(family, parts, prompts, settings.subject.prior_loss_weight, cached)
    batches = training.batches(processes)
    losses: Measure = partial(fixed_losses, loss, data, _fixed_batches(items, training.batch_size), training.seed)
    taken = [losses, *measures] if path is not None else [losses]
    text_lr = None if text_encoder_lr is None else Rate(text_encoder_lr, "text_encoder")
    texts_learn = [p for name, part in parts.items() if name not in family.denoisers for p in part.parameters()]
    return AdaptedTask(
        adaptation,
        loss,
        batches=diffusion_batches(data, training.batch_size, batches, training.seed, training.workers),
        evaluate=lambda: {name: value for measure in taken for name, value in measure().items()},
        own_lr={p: text_lr for p in texts_learn if p.requires_grad and text_lr is not None},
        path=path,
        measured=_kind_of(training.best_metric),
    )


def _kind_of(metric: str) -> str:
    """Return the kind of images that a metric is measured on: a few images of a subject cannot be split."""
    return "training-image" if "loss" in metric else "generated-picture"


@torch.no_grad()
def fixed_losses(loss: DiffusionLoss, data: Items, batches: Sequence[Sequence[Place]], seed: int) -> dict[str, float]:
    """Return the losses on the subject and on the class, with the same noise at every call."""
    loss.eval()
    errors: dict[str, list[float]] = defaultdict(list)
    for places in batches:
        batch = collate([seeded_entry(data, index, "evaluation", seed, number) for number, index in places])
        name = "prior_loss" if batch["prior"][0] else "loss"
        errors[name] += loss.errors(batch).tolist()
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    return {**means, **{f"{name}_samples": len(values) for name, values in errors.items()}}


def _fixed_batches(items: Sequence[Item], batch_size: int) -> list[list[Place]]:
    """Return batches of one size and one kind, with the same few images for every seed and batch size."""
    batches = []
    for prior in (False, True):
        by_kind: dict[tuple[int, ...], list[Place]] = defaultdict(list)
        chosen = [index for index, item in enumerate(items) if item.prior == prior]
        for number, index in enumerate(itertools.islice(itertools.cycle(chosen), _MEASURED)):
            by_kind[items[index].kind].append((number, index))
        for places in by_kind.values():
            batches += [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return batches
