"""The images of train_classifier.py: embedded digits, class folders, datasets by timm's name, few shots of them."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from randlora_vision.training import demo_classifier, digits
from randlora_vision.training.class_folders import read_class_folders
from randlora_vision.training.classifier_datasets import read_dataset
from randlora_vision.training.classifier_options import ClassifierOptions, DataOptions
from randlora_vision.training.images import ImageSplits, SkipList


def read_images(options: ClassifierOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images to adapt to, and those of the task that the base model already does, if known."""
    data = options.data
    splits, original = _read(data, skipped), None
    if options.embedded and options.model.model is None:
        original = digits.read_digits(demo_classifier.KNOWN_DIGITS)
    if data.shots is not None:
        splits = few_shots(splits, data.shots, data.split_seed)
    return splits, original


def _read(data: DataOptions, skipped: SkipList) -> ImageSplits:
    if data.dataset is not None:
        return read_dataset(data, data.dataset)
    if data.data is None:
        return digits.read_digits(inverted=True)
    return read_class_folders(Path(data.data), data.val_fraction, data.split_seed, skipped)


def few_shots(splits: ImageSplits, shots: int, seed: int) -> ImageSplits:
    """Return the splits with `shots` training images of every class, drawn without replacement.

    Raises ValueError when a class has fewer.
    """
    chosen = few_shot_indices(splits.labels["train"], splits.class_names, shots, seed)
    images, labels = splits.images["train"], splits.labels["train"]
    return replace(
        splits,
        images={**splits.images, "train": [images[i] for i in chosen]},
        labels={**splits.labels, "train": [labels[i] for i in chosen]},
        origin=f"{splits.origin}; {shots} shots a class, seed {seed}",
        chosen=chosen,
    )


def few_shot_indices(labels: Sequence[int], names: Sequence[str], shots: int, seed: int) -> list[int]:
    """Return the positions of `shots` images of every class, in order."""
    members: Mapping[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    short = [(len(members[label]), name) for label, name in enumerate(names) if len(members[label]) < shots]
    if short:
        count, name = min(short)
        raise ValueError(
            f"--shots {shots}: the class {name!r} has {count} training images ({len(short)} classes have too few)"
        )
    generator = random.Random(seed)
    return sorted(index for label in range(len(names)) for index in generator.sample(members[label], shots))
