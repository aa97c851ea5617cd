"""Shards that are read in order during training: which of their samples can be used, and for what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import Classes, cleaned
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import Picture
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tar_members import Sample
from randlora_vision.training.data.sources.tar_shards import (
    expand,
    is_shards,
    samples_part,
    shard_groups,
    split_spec,
    what_is_there,
)
from randlora_vision.training.data.sources.tar_stream import is_url, require_webdataset, stream_shard

_ADJACENT = " (in streamed shards, the members of a sample follow each other)"
_LOOKED_AT = 100


@dataclass(frozen=True)
class ShardStream:
    """Shards of images with captions, or with the `classes` of the validation data."""

    source: str
    shards: Sequence[str]
    options: SourceOptions
    classes: Classes | None
    prompts: Sequence[Sequence[str]] = ()  # of each class: captions that are made from it
    groups: Sequence[int] = ()  # of each class: equal for classes whose captions mean the same

    def from_classes(self, prompts: Sequence[Sequence[str]], groups: Sequence[int]) -> "ShardStream":
        """Return the images with captions, those of their classes, and the groups of these."""
        return replace(self, prompts=prompts, groups=groups)

    def usable(self, shard: str, skipped: SkipList) -> Iterator[tuple[Picture, tuple[Any, ...]]]:
        """Yield the images of a shard that have a caption or a known class, by the rules of all other sources.

        Beside an image is its class, or its captions and their class (None if they were not made from one). Other
        samples, and a shard that cannot be read to its end, are recorded in `skipped`.
        """
        try:
            for sample in stream_shard(shard):
                yield from self._usable(sample, skipped)
        except OSError as error:
            skipped.add(shard, f"the shard cannot be read: {error}")

    def _usable(self, sample: Sample, skipped: SkipList) -> Iterator[tuple[Picture, tuple[Any, ...]]]:
        part = cleaned(self._part([sample], skipped), skipped)
        for captions in part.captions or ():
            yield part.images[0], (captions, None)
        for label in part.labels or ():
            position = self.classes.position(str(label)) if self.classes else None
            if position is None:
                skipped.add(f"{sample.shard}:{sample.key}", f"its class {label!r} is not in the validation data")
            else:
                yield part.images[0], ((self.prompts[position], self.groups[position]) if self.prompts else (position,))

    def _part(self, samples: Sequence[Sample], skipped: SkipList) -> Part:
        return samples_part(self.source, samples, self.classes is None, self.options, skipped, _ADJACENT)

    def check(self) -> None:
        """Raise ValueError if none of the first samples can be used, or if no shard can be read."""
        samples: list[Sample] = []
        reasons = ["the shards are empty"]
        for shard in self.shards:
            try:
                for sample in stream_shard(shard):
                    if any(True for _ in self._usable(sample, SkipList())):
                        return
                    samples.append(sample)
                    if len(samples) == _LOOKED_AT:
                        break
            except OSError as error:
                reasons.insert(-1, f"the shard {shard} cannot be read: {error}")
            if samples:
                break
        labels = self._part(samples, SkipList()).labels
        if not samples:
            why = reasons[0]
        elif labels and self.classes:
            why = f"its classes ({listing(map(str, labels))}) are not those of the validation data: "
            why += listing(self.classes.names)
        else:
            kind = "a caption" if self.classes is None else "a class"
            why = f"none of the first {len(samples)} samples has an image and {kind}, as the validation data has"
            why += f"{_ADJACENT}; {what_is_there(samples)}"
        raise ValueError(f"{self.source}: {why}")


def shard_stream(options: SourceOptions, classes: Classes | None, skipped: SkipList) -> ShardStream:
    """Return the shards of --data, on disk or at URLs; raise ValueError for other data and as `ShardStream.check`."""
    spec = options.data or ""
    require_webdataset()
    shards: list[str] = []
    for part in split_spec(spec):
        if is_url(part):
            if "*" in part and not part.startswith("pipe:"):
                raise ValueError(f"--data {part}: spell URLs as in {{000..012}}, they cannot be listed for a *")
            shards += expand(part)
        elif is_shards(part):
            shards += map(str, shard_groups(part, skipped)["train"])
        else:
            raise ValueError(f"--streaming reads WebDataset shards (.tar), but --data has {part}")
    source = f"{spec} ({len(shards)} shards)" if len(shards) > 1 else spec
    stream = ShardStream(source, list(dict.fromkeys(shards)), options, classes)
    stream.check()
    return stream
