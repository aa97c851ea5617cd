"""Videos whose frames say which they are by their brightness."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

STEP = 8  # of the brightness from one frame to the next


def write_video(path: Path, times: Sequence[float], size: tuple[int, int] = (32, 24), rotation: int = 0) -> Path:
    """Write a frame for each time in seconds, without loss, of this size (width, height)."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        codec, stored = ("qtrle", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
        unit = 16 if path.suffix == ".avi" else 1000  # AVI has no times, only numbers of frames
        stream = container.add_stream(codec, rate=unit)
        stream.width, stream.height = size
        stream.pix_fmt = stored
        stream.time_base = stream.codec_context.time_base = Fraction(1, unit)
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this version of PyAV writes no rotation; it reads one")
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), STEP * number, dtype=np.uint8)
            pixels[0, 0] = 255  # the upper left corner
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(unit * time), Fraction(1, unit)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    """Which frames of a video these are."""
    return [round(float(np.asarray(frame)[5, 5].mean()) / STEP) for frame in frames]
