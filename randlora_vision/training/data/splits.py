"""Training, validation and test splits from a source of data, and subsets of the training data.

By hand, because a stratified split of scikit-learn can leave a small class without a held-out image, and would draw the
splits of existing runs again.
"""

import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from randlora_vision.names import counted, listing
from randlora_vision.training.data.captioned import PairSplits
from randlora_vision.training.data.cleaning import Classes, look_alike
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.options import SplitOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import StoredImage
from randlora_vision.training.data.split_names import SPLITS

Splits = ImageSplits | PairSplits
_MOST_PAIRS = 1000  # held out: recall compares all pairs, and 1000 is the usual number in the literature


def make_splits(name: str, parts: Mapping[str, Part], fraction: float, seed: int) -> Splits:
    """Return the splits of a source that has `train` and may have `val` and `test`.

    If `val` is missing, a `fraction` of `train` is held out, drawn with `seed`. A missing `test` stays missing. The
    parts have been cleaned.

    Raises ValueError when some parts have captions and others classes, when there are no images to train on or
    to hold out, when there are fewer than two classes, when a part has a class that `train` lacks, or when two parts
    share a file.
    """
    if "train" not in parts:
        raise ValueError(
            f"{name} has no images to train on, only {' and '.join(part.source for part in parts.values())}; "
            "--eval-only evaluates on it"
        )
    _check_parts(parts)
    held_out = sorted(set(parts) - {"train"})
    origin = f"its own {' and '.join(held_out)}" if held_out else ""
    if "val" not in parts:
        origin += f"{', ' if origin else ''}fraction {fraction} held out for validation, seed {seed}"
    whole = parts["train"].captions is None
    splits = _image_splits(name, parts, origin) if whole else _pair_splits(name, parts, origin)
    if held_out:
        notes = f"splits: {', '.join(f'{split} is {parts[split].source}' for split in SPLITS if split in parts)}"
        splits = replace(splits, notes=(*splits.notes, notes))
    return splits if "val" in parts else _with_held_out(splits, parts["train"].source, fraction, seed)


def make_evaluation(name: str, parts: Mapping[str, Part], wanted: str | None) -> Splits:
    """Return images to evaluate on, none of which is for training, as a single split.

    `wanted` is one of the parts, or "all" of them together; the default is the source's own test split, else its own
    validation split, else all. Raises ValueError when there is no such part, and as `make_splits` does.
    """
    _check_parts(parts)
    chosen = wanted or next((split for split in ("test", "val") if split in parts), "all")
    if chosen != "all" and chosen not in parts:
        raise ValueError(f"--eval-split {chosen}: {name} has no such split, only {listing(parts)}")
    everything, *others = parts.values()
    for part in others:
        everything = everything + part
    part = everything if chosen == "all" else parts[chosen]
    origin = f"all {counted(len(part.images), 'image')}" if chosen == "all" else f"its own {chosen} split"
    if part.captions is not None:
        return _pair_splits(name, {chosen: part}, origin)
    return _image_splits(name, {chosen: part}, origin, classes=everything)


def make_streamed(name: str, parts: Mapping[str, Part]) -> tuple[Splits, Classes | None]:
    """Return `val`, maybe `test` and an empty `train`, with the classes of `val`; raises as `make_splits` does."""
    _check_parts(parts)
    empty = parts["val"].take(())
    origin = f"--val-data{' and --test-data' if 'test' in parts else ''}"
    if parts["val"].captions is not None:
        return _pair_splits(name, {"train": empty, **parts}, origin), None
    splits = _image_splits(name, {"train": empty, **parts}, origin, classes=parts["val"])
    return splits, _classes(_class_names(parts, parts["val"]), parts["val"])


def _check_parts(parts: Mapping[str, Part]) -> None:
    first = next(iter(parts.values()))
    for part in parts.values():
        if (part.captions is None) != (first.captions is None):
            kinds = ("captions", "classes") if first.captions is not None else ("classes", "captions")
            raise ValueError(f"{first.source} has images with {kinds[0]}, but {part.source} has images with {kinds[1]}")
        if not part.images:
            raise ValueError(f"no readable images in {part.source}")
    owners: dict[str, Part] = {}
    for part in parts.values() if len(parts) > 1 else ():
        named = (image for image in part.images if not isinstance(image, Image.Image | StoredImage))
        files = {os.path.realpath(str(image)) for image in named}
        shared = sorted(file for file in files if file in owners)
        if shared:
            raise ValueError(
                f"{owners[shared[0]].source} and {part.source} share {counted(len(shared), 'image')}, for example "
                f"{shared[0]}: what is measured must not be trained on"
            )
        owners.update(dict.fromkeys(files, part))


def _pair_splits(name: str, parts: Mapping[str, Part], origin: str) -> PairSplits:
    present = [split for split in (*SPLITS, "all") if split in parts]
    captions: Any = {split: parts[split].captions or () for split in present}  # cleaned: without None
    return PairSplits(
        name=name, images={split: parts[split].images for split in present}, captions=captions, origin=origin
    )


def _image_splits(name: str, parts: Mapping[str, Part], origin: str, classes: Part | None = None) -> ImageSplits:
    """Return the splits; the classes are those of `train`, or of the part `classes`."""
    present = [split for split in (*SPLITS, "all") if split in parts]
    source = classes or parts["train"]
    names = _class_names(parts, source)
    numbers = _classes(names, source)
    labels = {split: _positions(parts[split], numbers, source) for split in present}
    found = {label for of_split in labels.values() for label in of_split} if classes else set(labels["train"])
    if len(found) < 2 and (classes is None or len(names) < 2):
        raise ValueError(
            f"only one class with images in {source.source} ({names[found.pop()]!r}): classification needs two or more"
        )
    alike = [
        f"classes that differ only in case, underscores or the spelling of a number: {listing(group)}"
        for group in look_alike(names).values()
    ]
    return ImageSplits(
        name=name,
        class_names=[name.replace("_", " ") for name in names],
        images={split: list(parts[split].images) for split in present},
        labels=labels,
        origin=origin,
        notes=tuple(alike),
    )


def _class_names(parts: Mapping[str, Part], source: Part) -> list[str]:
    """Return the names of the labels 0, 1, 2...: the given names, else the distinct labels."""
    for part in parts.values():
        if part.class_names != source.class_names:
            raise ValueError(
                f"{source.source} and {part.source} have different classes: "
                f"{listing(source.class_names or ())} and {listing(part.class_names or ())}"
            )
    return list(source.class_names) if source.class_names else Classes(map(str, source.labels or ())).names


def _classes(names: Sequence[str], source: Part) -> Classes:
    """Return the classes by label: by number where the source has their names."""
    return Classes(map(str, range(len(names)) if source.class_names else source.labels or ()))


def _positions(part: Part, classes: Classes, source: Part) -> list[int]:
    known = {label: classes.position(str(label)) for label in set(part.labels or ())}
    unknown = sorted(str(label) for label, position in known.items() if position is None)
    if unknown:
        raise ValueError(f"{part.source} has classes that {source.source} lacks: {listing(unknown)}")
    return [position for label in part.labels or () if (position := known[label]) is not None]


def _with_held_out(splits: Splits, source: str, fraction: float, seed: int) -> Splits:
    count = len(splits.images["train"])
    if isinstance(splits, ImageSplits):
        kept, held_out = hold_out(splits.labels["train"], splits.class_names, fraction, seed)
    elif count < 2:
        raise ValueError(f"{source} has only one image, which cannot be used for both training and validation")
    else:
        most = min(count - 1, max(1, round(fraction * count)), _MOST_PAIRS)
        held_out = sorted(random.Random(seed).sample(range(count), most))
        kept = sorted(set(range(count)) - set(held_out))
    rest = {split: place for split, place in splits.all_places().items() if split != "train"}
    return splits.recut({"train": ("train", kept), "val": ("train", held_out), **rest})


def hold_out(labels: Sequence[int], names: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return positions kept and held out, `fraction` of each class; raise ValueError for a class of one image."""
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


def training_part(splits: Splits, options: SplitOptions) -> Splits:
    """Return the splits with the part of `train` that --shots or --train-fraction asks for.

    The positions of its images in the whole of `train` are stored in `chosen`. A class with fewer images than
    --shots gives all of them, and a note says how many such classes there are. Raises ValueError when --shots is given
    for data without classes.
    """
    seed, fraction = options.split_seed, options.train_fraction
    count = len(splits.images["train"])
    if options.shots is not None:
        if isinstance(splits, PairSplits):
            raise ValueError("--shots counts images per class, but this data has captions: use --train-fraction")
        chosen = few_shot_indices(splits.labels["train"], options.shots, seed)
        part = f"{options.shots} shots a class"
        splits = replace(splits, notes=(*splits.notes, *_short_classes(splits, options.shots)))
    elif fraction < 1:
        part = f"fraction {fraction} of the training images"
        if isinstance(splits, ImageSplits):
            chosen = _drawn_of_classes(splits.labels["train"], lambda count: max(1, round(fraction * count)), seed)
        else:
            chosen = sorted(random.Random(seed).sample(range(count), max(1, round(fraction * count))))
    else:
        return splits
    places = {**splits.all_places(), "train": ("train", chosen)}
    return splits.recut(places, origin=f"{splits.origin}; {part}, seed {seed}", chosen=chosen)


def few_shot_indices(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Return the positions of `shots` images of every class, or of all that it has, in order."""
    return _drawn_of_classes(labels, lambda count: min(shots, count), seed)


def _short_classes(splits: ImageSplits, shots: int) -> list[str]:
    of_class = members(splits.labels["train"])
    counts = [(len(of_class.get(label, ())), name) for label, name in enumerate(splits.class_names)]
    short = sorted((count, name) for count, name in counts if count < shots)
    if not short:
        return []
    words = listing(f"{name!r} has {count}" for count, name in short)
    return [f"{len(short)} of {len(counts)} classes have fewer than {shots} training images: {words}"]


def _drawn_of_classes(labels: Sequence[int], how_many: Callable[[int], int], seed: int) -> list[int]:
    """Return the positions, in order, of `how_many` images of every class, a function of their count."""
    generator = random.Random(seed)
    return sorted(
        index
        for _, indices in sorted(members(labels).items())
        for index in generator.sample(indices, how_many(len(indices)))
    )
