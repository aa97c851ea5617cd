"""The clips of a subject, for a pipeline of videos."""

import dataclasses

from randlora_vision.training.data.pictures import Picture, readable
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.video import Clip, file_rate
from randlora_vision.training.dreambooth.batches import read_picture
from randlora_vision.training.dreambooth.families import FAMILIES, Family
from randlora_vision.training.dreambooth.subject import Subject

_SLOW = 0.9  # of the rate of the pipeline: below it, frames come twice


def at_the_rate_of(family: Family, subject: Subject, num_frames: int, skipped: SkipList) -> Subject:
    """Return a subject with its clips at the rate of the family; those that are too short are recorded in `skipped`.

    Raises ValueError if the family does not make videos or not of `num_frames` frames, and if no clip remains.
    """
    if num_frames == 1:
        return subject
    if family.frame_rate is None:
        videos = ", ".join(sorted(name for name, kind in FAMILIES.items() if kind.frame_rate is not None))
        raise ValueError(f"--num-frames {num_frames}: a {family.pipeline} makes images; these make videos: {videos}")
    several = family.frames_per_latent
    more = (num_frames - 1) % several
    if more:
        fewer = max(num_frames - more, 1 + several)
        raise ValueError(
            f"--num-frames {num_frames}: a {family.pipeline} takes {several}k+1 frames, such as {fewer} or "
            f"{fewer + several}"
        )
    clips: list[Clip] = []
    kept: list[tuple[Picture, str]] = []
    for image, caption in zip(subject.images, subject.captions, strict=True):
        if isinstance(image, Clip):
            image = dataclasses.replace(image, rate=family.frame_rate)
            clips.append(image)
            if readable(image, skipped) is None:
                continue
            rate = file_rate(image.file)
            if rate is not None and rate < _SLOW * family.frame_rate:
                skipped.change(image, f"frames came more than once: fewer than {family.frame_rate:g} per second")
        kept.append((image, caption))
    if not kept:
        read_picture(clips[0])  # raises with the reason
    return dataclasses.replace(subject, images=[image for image, _ in kept], captions=[text for _, text in kept])
