"""The images of a data set by split, with classes (`labelled`) or captions (`captioned`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from PIL import Image

from randlora_vision.files.text import as_utf8
from randlora_vision.names import counted
from randlora_vision.training.data.batches import Pictures
from randlora_vision.training.data.decode import WHITE, Colour
from randlora_vision.training.data.part import Stream
from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.data.split_names import images_of

_Splits = TypeVar("_Splits", bound="SplitImages")
_Data = TypeVar("_Data", bound=Pictures)


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """Images (files, items of a dataset, or already decoded) of each split, and the origin of the splits.

    `val` is evaluated during training and selects the best state. `test`, if there is one, is evaluated before and
    after training; otherwise `val` is, and its figures are called those of the validation images. Images for
    evaluation alone are a single split: `train`, `val`, `test` or `all`.
    """

    tables: ClassVar[tuple[str, ...]]
    """The fields that have an entry for every image of every split."""
    name: str
    images: Mapping[str, Sequence[Picture]]
    origin: str
    augment: Callable[[Image.Image], Image.Image] | None = None  # in place of the model's own augmentation
    chosen: Sequence[int] | None = None  # where `train` is a part: its positions in the whole training split
    notes: Sequence[str] = ()  # for the user, one line each
    background: Colour = WHITE  # of transparent pixels
    stream: Stream | None = None  # in place of `train`, which is then empty

    @property
    def final(self) -> str:
        """The split that is evaluated before and after training: `test`, else `val`, else the only one."""
        return next((split for split in ("test", "val") if split in self.images), next(iter(self.images)))

    @property
    def sizes(self) -> str:
        """The sizes of the splits in words."""
        streamed = [f"{counted(len(self.stream.shards), 'shard')} streamed for train"] if self.stream else []
        counts = {split: len(images) for split, images in self.images.items() if images or not self.stream}
        *others, last = counts
        sizes = [*(f"{counts[split]} {split}" for split in others), images_of(last, counts[last])]
        return ", ".join([*streamed, *sizes])

    def reading(self, data: _Data, split: str) -> _Data:
        """Return the dataset of a split after telling it how its pictures are read."""
        data.background = self.background
        data.stream = self.stream if split == "train" else None
        return data

    def recut(self: _Splits, places: Mapping[str, tuple[str, Sequence[int]]], **changes: Any) -> _Splits:
        """Return other splits: the images at some positions of one of these splits, for each."""
        tables = {name: table for name in self.tables if (table := getattr(self, name)) is not None}
        for name, table in tables.items():
            changes[name] = {split: [table[source][i] for i in chosen] for split, (source, chosen) in places.items()}
        return replace(self, **changes)

    def all_places(self) -> dict[str, tuple[str, Sequence[int]]]:
        """Return the argument of `recut` that changes nothing."""
        return {split: (split, range(len(images))) for split, images in self.images.items()}

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps: the sizes, the origin, and the files that were held out.

        Embedded images have no names and are left out.
        """
        held_out = {
            split: [as_utf8(image) for image in images if not isinstance(image, Image.Image)]
            for split, images in self.images.items()
            if split != "train"
        }
        return {
            "name": self.name,
            "origin": self.origin,
            "sizes": {split: len(images) for split, images in self.images.items()},
            "held_out": held_out,
            **({"chosen": list(self.chosen)} if self.chosen is not None else {}),
            **({"streamed": list(self.stream.shards)} if self.stream is not None else {}),
        }
