"""Clips: the frames of a video that are shown at even times, upright, and what is said of files without them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from randlora_vision.training.data.pictures import readable
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.video import Clip, file_rate, is_video_name
from tests.video_helpers import numbers, write_video

pytest.importorskip("av")


def even(count: int, rate: float) -> list[float]:
    return [number / rate for number in range(count)]


@pytest.mark.parametrize("suffix", ["mkv", "mov", "avi"])
def test_consecutive_frames_from_everywhere(suffix: str, tmp_path: Path) -> None:
    clip = Clip(write_video(tmp_path / f"a.{suffix}", even(12, 16)), 5, rate=16)
    assert file_rate(clip.file) == pytest.approx(16, rel=0.01)
    assert numbers(clip.read(center=True)) == [4, 5, 6, 7, 8]
    assert numbers([clip.open()]) == [6]
    random.seed(0)
    drawn = [numbers(clip.read(center=False)) for _ in range(40)]
    assert {found[0] for found in drawn} == set(range(8))
    assert all(found == list(range(found[0], found[0] + 5)) for found in drawn)


def test_frames_are_those_shown_at_the_rate(tmp_path: Path) -> None:
    fast, slow = write_video(tmp_path / "fast.mkv", even(21, 30)), write_video(tmp_path / "slow.mkv", even(4, 8))
    assert numbers(Clip(fast, 5, rate=15).read(center=True)) == [6, 8, 10, 12, 14]
    assert numbers(Clip(slow, 4, rate=16).read(center=True)) in ([1, 2, 2, 3], [1, 1, 2, 2])
    times = [0.0, 0.04, 0.1, 0.5, 0.52, 0.56, 0.9, 1.0]  # a telephone: fast, slow, fast
    varying = write_video(tmp_path / "varying.mkv", times)
    found = numbers(Clip(varying, 11, rate=10).read(center=True))
    assert found == [int(np.abs(np.array(times) - number / 10).argmin()) for number in range(11)]


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    """A player turns the frame against the clock: the upper left corner is then the lower left one."""
    path = write_video(tmp_path / "a.mov", even(3, 10), rotation=90)
    frame = Clip(path, 1).open()
    assert frame.size == (24, 32)
    assert frame.getpixel((0, 31)) == (255, 255, 255)


def test_what_has_no_clip_is_skipped_with_the_reason(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mkv", even(8, 16))
    cut, text = tmp_path / "cut.mkv", tmp_path / "text.mp4"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3])
    text.write_text("no video")
    reasons = {
        good: r"it is too short: 9 frames at 16 per second take 0.5 s from first to last, but its 8 frames take 0.43",
        text: "FFmpeg cannot read it: Invalid data found",
        tmp_path / "none.mp4": "No such file",
    }
    for path, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            readable(Clip(path, 9, rate=16), SkipList(strict=True))
    assert numbers(Clip(cut, 3, rate=16).read(center=True))  # what is left of it can be read
    with pytest.raises(ValueError, match="it is too short"):
        readable(Clip(cut, 8, rate=16), SkipList(strict=True))
    skipped = SkipList(tmp_path / "skipped.txt")
    assert readable(Clip(text, 9), skipped) is None and skipped.count() == 1


def test_names_of_videos() -> None:
    assert is_video_name("a.MP4") and not is_video_name("a.gif") and not is_video_name("._a.mp4")
