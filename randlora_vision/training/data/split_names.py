"""Which split a folder, a file or a row of a table is named after."""

import re

from randlora_vision.names import counted

SPLITS = ("train", "val", "test")
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_NAMES = {
    spelling + ending: split
    for split, spellings in _SPELLINGS.items()
    for spelling in spellings
    for ending in ("", "set", "data", "images", "split")
}


def images_of(split: str, count: float) -> str:
    """Return the size of a split in words; "all" is what is evaluated of data that has no splits."""
    return counted(count, "image" if split == "all" else f"{split} image")


def split_of(name: str) -> str | None:
    """Return the split that a folder or split is named after (Training, test_set, val2017), or None."""
    return _SPLIT_NAMES.get(re.sub("[^a-z]", "", name.lower()))


def split_in(name: str) -> str | None:
    """Return the split that one word of a name stands for (seg_train, set-val-0); None for no or several such words."""
    found = [split for word in re.split("[^a-z]+", name.lower()) if (split := split_of(word))]
    return found[0] if len(found) == 1 else None
