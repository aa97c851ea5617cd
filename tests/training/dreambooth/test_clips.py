"""Clips among the images of a subject: read, checked against the pipeline, cropped, batched, and drawn."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.video import Clip
from randlora_vision.training.dreambooth.batches import CaptionedPixels, collate, diffusion_batches
from randlora_vision.training.dreambooth.clips import at_the_rate_of
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.samples import as_image
from randlora_vision.training.dreambooth.subject import make_items, read_subject
from tests.video_helpers import STEP, write_video

pytest.importorskip("av")
WAN: Any = SimpleNamespace(pipeline="WanPipeline", frame_rate=16, frames_per_latent=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, of which one is too short for five frames, and an image."""
    write_video(tmp_path / "long.mkv", [number / 16 for number in range(9)])
    write_video(tmp_path / "short.mkv", [0, 0.1])
    (tmp_path / "long.txt").write_text("a dog runs")
    Image.new("RGB", (32, 24), "red").save(tmp_path / "still.png")
    return tmp_path


def options(folder: Path, frames: int) -> SubjectOptions:
    return SubjectOptions(instance_data_dir=str(folder), instance_prompt="a dog", num_frames=frames)


def test_videos_become_clips_that_the_pipeline_takes(folder: Path) -> None:
    skipped = SkipList(folder / "skipped.tsv")
    subject = at_the_rate_of(WAN, read_subject(options(folder, 5), skipped), 5, skipped)
    assert [str(image) for image in subject.images] == [str(folder / name) for name in ("long.mkv", "still.png")]
    assert list(subject.captions) == ["a dog runs", "a dog"]
    assert subject.record()["images"][0] == str(folder / "long.mkv")
    assert "short.mkv\tit is too short: 5 frames at 16 per second" in (folder / "skipped.tsv").read_text()
    items, _ = make_items(subject, [], [(16, 16)], SubjectOptions(), 0)
    assert [item.kind for item in items] == [(5, 16, 16), (1, 16, 16)]
    data = CaptionedPixels(items, center_crop=False)
    random.seed(1)
    clip, still = data[0], data[1]
    assert clip.inputs.shape == (3, 5, 16, 16) and still.inputs.shape == (3, 16, 16)
    levels = ((clip.inputs[0, :, 8, 8] + 1) * 127.5 / STEP).round().tolist()
    assert levels == [levels[0] + number for number in range(5)]
    batches = list(diffusion_batches(data, 1, 6, seed=0, workers=0))
    assert {batch["inputs"].shape for batch in batches} == {(1, 3, 5, 16, 16), (1, 3, 16, 16)}
    assert collate([clip, clip])["inputs"].shape == (2, 3, 5, 16, 16)


def test_every_frame_is_cropped_alike(folder: Path) -> None:
    """The frames have a white corner, which a crop contains in all of them or in none."""
    subject = at_the_rate_of(WAN, read_subject(options(folder, 5), SkipList()), 5, SkipList())
    items, _ = make_items(subject, [], [(24, 24)], SubjectOptions(), 0)
    data = CaptionedPixels(items[:1], center_crop=False)
    random.seed(0)
    crops = [data[0] for _ in range(12)]
    corner = torch.stack([entry.inputs[:, :, 0, 0].mean(0) == 1 for entry in crops])
    assert torch.equal(corner.all(1), corner.any(1)) and len(set(corner.all(1).tolist())) == 2
    assert corner.all(1).tolist() == [entry.sizes[3] == 0 for entry in crops]


def test_without_num_frames_videos_are_left_out(folder: Path) -> None:
    skipped = SkipList(folder / "skipped.tsv")
    assert len(read_subject(options(folder, 1), skipped).images) == 1
    assert "it is a video: --num-frames" in (folder / "skipped.tsv").read_text()
    (folder / "still.png").unlink()
    with pytest.raises(ValueError, match="contains no images: its videos are for pipelines of videos"):
        read_subject(options(folder, 1), SkipList())


def test_what_cannot_be_trained_on_clips_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = read_subject(options(folder, 5), SkipList())
    image: Any = SimpleNamespace(pipeline="FluxPipeline", frame_rate=None)
    with pytest.raises(ValueError, match="a FluxPipeline makes images; these make videos: LTXPipeline, WanPipeline"):
        at_the_rate_of(image, subject, 5, SkipList())
    with pytest.raises(ValueError, match=r"--num-frames 7: a WanPipeline takes 4k\+1 frames, such as 5 or 9"):
        at_the_rate_of(WAN, subject, 7, SkipList())
    with pytest.raises(ValueError, match=r"--num-frames 3: .* such as 5 or 9"):
        at_the_rate_of(WAN, subject, 3, SkipList())
    for name in ("long.mkv", "still.png"):
        (folder / name).unlink()
    skipped = SkipList(folder / "skipped.tsv")
    with pytest.raises(ValueError, match=r"cannot read the image .*short.mkv: it is too short"):
        at_the_rate_of(WAN, read_subject(options(folder, 5), skipped), 5, skipped)
    with pytest.raises(ValueError, match="is without masks, images to edit and prior preservation"):
        SubjectOptions(instance_data_dir="x", num_frames=5, alpha_mask=True)
    with pytest.raises(ValueError, match="--num-frames needs --instance-data-dir"):
        SubjectOptions(num_frames=5)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="videos are read with the package av: pip install"):
        options(folder, 5)


def test_slow_videos_are_recorded(folder: Path) -> None:
    """A second at 4 frames per second is enough for 9 frames at 16, of which the file has 3."""
    write_video(folder / "slow.mkv", [number / 4 for number in range(5)])
    skipped = SkipList(folder / "skipped.tsv")
    subject = at_the_rate_of(WAN, read_subject(options(folder, 9), skipped), 9, skipped)
    assert [Path(str(image)).name for image in subject.images if isinstance(image, Clip)] == ["long.mkv", "slow.mkv"]
    assert skipped.changes() == {"frames came more than once: fewer than 16 per second": 1}


def test_a_clip_is_drawn_as_three_frames() -> None:
    clip = torch.zeros(3, 5, 2, 4)
    clip[0, 0], clip[1, 2], clip[2, 4] = 1, 1, 1
    image = as_image(clip)
    assert image.size == (12, 2)
    assert [image.getpixel((x, 0)) for x in (1, 5, 9)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert Clip(Path("a.mp4"), 5) == Clip(Path("a.mp4"), 5)
