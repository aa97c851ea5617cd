"""Clips of video files, read by PyAV: frames at even times, whatever the times of the frames in the file."""

import importlib.util
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from randlora_vision.files.text import require_regular
from randlora_vision.training.data.pictures import is_hidden

_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"))


def is_video_name(name: str) -> bool:
    """Return whether a file name is that of a video and not hidden."""
    return Path(name).suffix.lower() in _SUFFIXES and not is_hidden(name)


def require_reader() -> None:
    """Raise ValueError if PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("videos are read with the package av: pip install 'randlora_vision[video]'")


@dataclass(frozen=True)
class Clip:
    """A number of consecutive frames of a video, at a rate; as an image, it is its middle frame.

    Args:
        file: The video.
        frames: How many frames.
        rate: Frames per second, by default those of the file on average. Each frame is the one of the file that is
            nearest in time, so videos of any rate, also a variable one, have the speed at which they are shown.
    """

    file: Path
    frames: int
    rate: float | None = None

    def __str__(self) -> str:
        return str(self.file)

    def open(self) -> Image.Image:
        """Return the middle frame of the clip in the middle of the video; raises as `read`."""
        return self.read(center=True)[self.frames // 2]

    def read(self, center: bool) -> list[Image.Image]:
        """Return the frames of the clip in the middle, or of one that Python's `random` chooses, upright in RGB.

        Raises OSError for a file that cannot be read, and for a video that is too short.
        """
        with _opened(self.file) as container:
            stamp = self.file.stat()
            times, seconds = _times(self.file, (stamp.st_mtime_ns, stamp.st_size))
            places = [time * seconds for time in times]
            rate = self.rate or file_rate(self.file) or 1.0
            latest = places[-1] - (self.frames - 1) / rate + 0.1 / rate  # times in files are rounded
            starts = [place for place in places if place <= latest]
            if not starts:
                needed, found = (self.frames - 1) / rate, places[-1] - places[0]
                raise OSError(
                    f"it is too short: {self.frames} frames at {rate:.4g} per second take {needed:.3g} s from first to "
                    f"last, but its {len(places)} frames take {found:.3g} s"
                )
            start = starts[len(starts) // 2] if center else random.choice(starts)
            wanted = [_nearest(places, start + number / rate) for number in range(self.frames)]
            decoded = _decoded(container, {times[place] for place in wanted})
        missing = len({times[place] for place in wanted} - set(decoded))
        if missing:
            raise OSError(f"it is damaged: {missing} of {self.frames} frames cannot be decoded")
        return [decoded[times[place]] for place in wanted]


def file_rate(file: Path) -> float | None:
    """Return the average number of frames per second of a video, or None for a single frame; raises OSError."""
    stamp = file.stat()
    times, seconds = _times(file, (stamp.st_mtime_ns, stamp.st_size))
    return (len(times) - 1) / ((times[-1] - times[0]) * seconds) if len(times) > 1 else None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import av

    require_regular(file)
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise OSError("it contains no video")
            yield container
    except av.FFmpegError as error:
        raise OSError(f"FFmpeg cannot read it: {error.strerror}") from error


@lru_cache(1024)
def _times(file: Path, stamp: tuple[int, int]) -> tuple[list[int], float]:
    """Return the times of the frames in order and their unit in seconds; `stamp` changes with the file."""
    with _opened(file) as container:
        stream = container.streams.video[0]
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        found, seconds = {_time(packet) for packet in packets}, float(stream.time_base)
    if None in found or not found:
        raise OSError("its frames have no times" if found else "it contains no frames")
    return sorted(found), seconds


def _time(timed: Any) -> Any:
    return timed.dts if timed.pts is None else timed.pts


def _nearest(places: list[float], place: float) -> int:
    return min(range(len(places)), key=lambda number: abs(places[number] - place))


def _decoded(container: Any, wanted: Iterable[int]) -> dict[int, Image.Image]:
    """Return the frames at these times."""
    remaining, found = set(wanted), {}
    stream = container.streams.video[0]
    container.seek(min(remaining), stream=stream)  # to the last frame before it that depends on no other
    for frame in container.decode(stream):
        time = _time(frame)
        if time in remaining:
            remaining.remove(time)
            found[time] = _upright(frame, stream)
        if not remaining:
            break
    return found


def _upright(frame: Any, stream: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    shape = stream.sample_aspect_ratio
    if shape and shape != 1:  # pixels that are not square
        image = image.resize((round(image.width * shape), image.height))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
