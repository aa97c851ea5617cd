"""Training, validation and test splits from a source of data, and subsets of the training data.

By hand, because a stratified split of scikit-learn can leave a small class without a held-out image, and would draw the
splits of existing runs again.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from randlora_vision.names import listing
from randlora_vision.training.data.captioned import PairSplits
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.options import SplitOptions
from randlora_vision.training.data.pictures import Picture, SkipList

_MOST_PAIRS = 1000  # held out: recall compares all pairs, and 1000 is the usual number in the literature


@dataclass(frozen=True)
class Part:
    """Images of one split with labels, or with captions (at least one per image)."""

    source: str  # its name in messages
    images: Sequence[Picture]
    labels: Sequence[int] | Sequence[str] | None = None
    captions: Sequence[Sequence[str]] | None = None
    class_names: Sequence[str] | None = None  # names for integer labels, if there are any

    def take(self, indices: Iterable[int]) -> "Part":
        """Return the images at `indices`, in that order."""
        indices = list(indices)
        return Part(
            self.source,
            [self.images[i] for i in indices],
            [self.labels[i] for i in indices] if self.labels is not None else None,  # type: ignore[arg-type]
            [self.captions[i] for i in indices] if self.captions is not None else None,
            self.class_names,
        )


def make_splits(name: str, parts: Mapping[str, Part], fraction: float, seed: int) -> ImageSplits | PairSplits:
    """Return the splits of a source that has `train` and may have `val` and `test`.

    If `val` is missing, a `fraction` of `train` is held out, drawn with `seed`. If `test` is missing, it is the
    same as `val`.

    Raises ValueError when some parts have captions and others classes, when there are no images to train on or
    to hold out, when there are fewer than two classes, or when a part has a class that `train` lacks.
    """
    train = parts["train"]
    if not train.images:
        raise ValueError(f"no readable images in {train.source}")
    for part in parts.values():
        if (part.captions is None) != (train.captions is None):
            kinds = ("captions", "classes") if train.captions is not None else ("classes", "captions")
            raise ValueError(f"{train.source} has images with {kinds[0]}, but {part.source} has images with {kinds[1]}")
        if not part.images:
            raise ValueError(f"no readable images in {part.source}")
    held_out = sorted(set(parts) - {"train"})
    origin = f"its own {' and '.join(held_out)}" if held_out else ""
    if "val" not in parts:
        origin += f"{', ' if origin else ''}fraction {fraction} held out for validation, seed {seed}"
    if train.captions is not None:
        return _pair_splits(name, parts, fraction, seed, origin)
    return _image_splits(name, parts, fraction, seed, origin)


def _pair_splits(name: str, parts: Mapping[str, Part], fraction: float, seed: int, origin: str) -> PairSplits:
    if "val" not in parts:
        parts = {**parts, **_hold_out_pairs(parts["train"], fraction, seed)}
    parts = {"test": parts["val"], **parts}
    return PairSplits(
        name,
        {split: parts[split].images for split in ("train", "val", "test")},
        {split: parts[split].captions or () for split in ("train", "val", "test")},
        origin,
    )


def _hold_out_pairs(train: Part, fraction: float, seed: int) -> dict[str, Part]:
    count = len(train.images)
    if count < 2:
        raise ValueError(f"{train.source} has only one image, which cannot be used for both training and validation")
    held_out = min(count - 1, max(1, round(fraction * count)), _MOST_PAIRS)
    chosen = set(random.Random(seed).sample(range(count), held_out))
    return {"train": train.take(i for i in range(count) if i not in chosen), "val": train.take(sorted(chosen))}


def _image_splits(name: str, parts: Mapping[str, Part], fraction: float, seed: int, origin: str) -> ImageSplits:
    names = _class_names(parts)
    labels = {split: _numbers(part, names, parts["train"]) for split, part in parts.items()}
    images = {split: list(part.images) for split, part in parts.items()}
    present = set(labels["train"])
    if len(present) < 2:
        raise ValueError(
            f"only one class with images in {parts['train'].source} ({names[present.pop()]!r}): "
            "classification needs two or more"
        )
    names = [name.replace("_", " ") for name in names]
    if "val" not in parts:
        kept, held_out = hold_out(labels["train"], names, fraction, seed)
        for table in (images, labels):
            everything = table["train"]
            table["train"], table["val"] = [everything[i] for i in kept], [everything[i] for i in held_out]  # type: ignore[misc]
    if "test" not in parts:
        images["test"], labels["test"] = images["val"], labels["val"]
    return ImageSplits(name, names, images, labels, origin)


def _class_names(parts: Mapping[str, Part]) -> list[str]:
    """Return the names of the labels 0, 1, 2...: the given names, else the sorted labels, else the numbers."""
    train = parts["train"]
    for part in parts.values():
        if part.class_names != train.class_names:
            raise ValueError(
                f"{train.source} and {part.source} have different classes: "
                f"{listing(train.class_names or ())} and {listing(part.class_names or ())}"
            )
    if train.class_names is not None:
        return list(train.class_names)
    labels = train.labels or ()
    if any(isinstance(label, str) for label in labels):
        return sorted({str(label) for label in labels})
    return [
        str(number) for number in range(max(int(label) for part in parts.values() for label in part.labels or ()) + 1)
    ]


def _numbers(part: Part, names: Sequence[str], train: Part) -> list[int]:
    """Return the labels of a part as numbers."""
    labels: Sequence[int | str] = part.labels or ()
    numbered = not any(isinstance(label, str) for label in train.labels or ())
    known: Mapping[int | str, int] = {number if numbered else name: number for number, name in enumerate(names)}
    labels = labels if numbered else [str(label) for label in labels]
    unknown = {label for label in labels if label not in known}
    if unknown:
        raise ValueError(f"{part.source} has classes that {train.source} lacks: {listing(sorted(map(str, unknown)))}")
    return [known[label] for label in labels]


def hold_out(labels: Sequence[int], names: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the positions kept and those held out: `fraction` of every class, at least one image but not all.

    Raises ValueError for a class with a single image.
    """
    chosen: set[int] = set()
    generator = random.Random(seed)
    for label, indices in sorted(members(labels).items()):
        if len(indices) < 2:
            raise ValueError(
                f"the class {names[label]!r} has only one image, which cannot be used for both training and "
                "validation; add images, or give validation images separately"
            )
        count = min(len(indices) - 1, max(1, round(fraction * len(indices))))
        chosen.update(generator.sample(indices, count))
    return [i for i in range(len(labels)) if i not in chosen], sorted(chosen)


def members(labels: Sequence[int]) -> Mapping[int, list[int]]:
    """Return the positions of each label."""
    found: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        found[label].append(index)
    return found


_Splits = TypeVar("_Splits", bound=ImageSplits | PairSplits)


def training_part(splits: _Splits, options: SplitOptions) -> _Splits:
    """Return the splits with the part of `train` that --shots or --train-fraction asks for.

    The positions of its images in the whole of `train` are stored in `chosen`. Raises ValueError when a class
    has fewer images than --shots, or when --shots is given for data without classes.
    """
    seed, fraction = options.split_seed, options.train_fraction
    count = len(splits.images["train"])
    if options.shots is not None:
        if isinstance(splits, PairSplits):
            raise ValueError("--shots counts images per class, but this data has captions: use --train-fraction")
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
    """Return the positions of a fraction of every class, at least one image each, in order."""
    generator = random.Random(seed)
    return sorted(
        index
        for _, indices in sorted(members(labels).items())
        for index in generator.sample(indices, max(1, round(fraction * len(indices))))
    )


def without_empty_captions(part: Part, skipped: SkipList) -> Part:
    """Strip whitespace from the captions, and leave out images whose captions are all empty."""
    if part.captions is None:
        return part
    captions = [[text.strip() for text in texts if text.strip()] for texts in part.captions]
    kept = [index for index, texts in enumerate(captions) if texts]
    for index in sorted(set(range(len(captions))) - set(kept)):
        skipped.add(f"the caption of {part.source}, {part.images[index]}", "it is empty")
    return replace(part, captions=captions).take(kept)
