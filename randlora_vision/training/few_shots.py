"""A part of the training images: so many of every class, or a fraction, drawn without replacement."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from randlora_vision.training.data_options import SplitOptions
from randlora_vision.training.images import ImageSplits
from randlora_vision.training.pairs import PairSplits
from randlora_vision.training.splits import listing, members

_Splits = TypeVar("_Splits", bound=ImageSplits | PairSplits)


def training_part(splits: _Splits, options: SplitOptions) -> _Splits:
    """Return the splits with the part of `train` that --shots or --train-fraction asks for.

    Its positions in the whole of `train` are kept in `chosen`. Raises ValueError when a class has fewer
    images than the shots, and for shots of data without classes.
    """
    seed, fraction = options.split_seed, options.train_fraction
    count = len(splits.images["train"])
    if options.shots is not None:
        if isinstance(splits, PairSplits):
            raise ValueError("--shots counts images of a class, and these have captions: use --train-fraction")
        chosen = few_shot_indices(splits.labels["train"], splits.class_names, options.shots, seed)
        part = f"{options.shots} shots a class"
    elif fraction < 1:
        part = f"fraction {fraction} of the training images"
        if isinstance(splits, ImageSplits):
            chosen = _fraction_of_classes(splits.labels["train"], fraction, seed)
        else:
            chosen = sorted(random.Random(seed).sample(range(count), max(1, round(fraction * count))))
    else:
        return splits
    return _with_part(splits, chosen, f"{splits.origin}; {part}, seed {seed}")


def _with_part(splits: _Splits, chosen: Sequence[int], origin: str) -> _Splits:
    images = {**splits.images, "train": [splits.images["train"][i] for i in chosen]}
    if isinstance(splits, ImageSplits):
        labels = {**splits.labels, "train": [splits.labels["train"][i] for i in chosen]}
        return replace(splits, images=images, labels=labels, origin=origin, chosen=chosen)
    captions = {**splits.captions, "train": [splits.captions["train"][i] for i in chosen]}
    return replace(splits, images=images, captions=captions, origin=origin, chosen=chosen)


def few_shot_indices(labels: Sequence[int], names: Sequence[str], shots: int, seed: int) -> list[int]:
    """Return the positions of `shots` images of every class, in order."""
    of_class = members(labels)
    counts = [(len(of_class.get(label, ())), name) for label, name in enumerate(names)]
    short = sorted((count, name) for count, name in counts if count < shots)
    if short:
        raise ValueError(
            f"--shots {shots}: too few training images: "
            f"{listing(f'the class {name!r} has {count}' for count, name in short)}"
        )
    generator = random.Random(seed)
    return sorted(index for label in range(len(names)) for index in generator.sample(of_class[label], shots))


def _fraction_of_classes(labels: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Return the positions of a part of every class, at least one image of it, in order."""
    generator = random.Random(seed)
    return sorted(
        index
        for _, indices in sorted(members(labels).items())
        for index in generator.sample(indices, max(1, round(fraction * len(indices))))
    )
