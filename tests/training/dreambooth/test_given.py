"""Masks and images to edit: cropped with their images, drawn by the seed, and asked for where they are needed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.batches import CachedLatents, CaptionedPixels, seeded_entry
from randlora_vision.training.dreambooth.families import Seen, with_image_of
from randlora_vision.training.dreambooth.given import random_mask
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.shown import images_shown
from randlora_vision.training.dreambooth.subject import Subject, make_items, read_subject, require_given


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    drawn = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((drawn * 255).byte().numpy())


class Family:
    """The VAE is the identity, and the condition what was given."""

    pipeline = "Some"

    def moments(self, pixels: Tensor) -> Tensor:
        return pixels

    def condition(self, pixels: Tensor, given: Tensor) -> Tensor:
        return given


FAMILY: Any = Family()


def items_of(subject: Subject, takes: Any) -> CaptionedPixels:
    items, _ = make_items(subject, [], [(16, 16)], SubjectOptions(), 0, takes)
    return CaptionedPixels(items, center_crop=False, takes=takes)


def test_what_is_given_is_cropped_as_the_image(tmp_path: Path) -> None:
    for folder, size in (("images", (40, 24)), ("originals", (40, 24)), ("smaller", (20, 12))):
        (tmp_path / folder).mkdir()
        picture(0, size).save(tmp_path / folder / "a.png")
    options = dict(instance_data_dir=str(tmp_path / "images"), instance_prompt="x")
    subject = read_subject(SubjectOptions(**options, cond_data_dir=(str(tmp_path / "originals"),)), SkipList())  # type: ignore[arg-type]
    data = items_of(subject, "image")
    crops = [data[0] for _ in range(4)]
    assert all(torch.allclose(entry.inputs, entry.given, atol=1e-6) for entry in crops)
    assert len({tuple(entry.sizes.tolist()) for entry in crops}) > 1
    assert read_subject(SubjectOptions(**options, cond_data_dir=(str(tmp_path / "smaller"),)), SkipList()).originals  # type: ignore[arg-type]
    (tmp_path / "smaller/a.png").rename(tmp_path / "smaller/b.png")
    with pytest.raises(ValueError, match=r"--cond-data-dir .*smaller has no image to edit for a.png: expected a.png"):
        read_subject(SubjectOptions(**options, cond_data_dir=(str(tmp_path / "smaller"),)), SkipList())  # type: ignore[arg-type]
    picture(0, (24, 40)).save(tmp_path / "smaller/a.png")
    other = read_subject(SubjectOptions(**options, cond_data_dir=(str(tmp_path / "smaller"),)), SkipList())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="24 x 40 pixels, but .* has 40 x 24"):
        require_given(other, "image", "FluxKontextPipeline", SubjectOptions())
    require_given(other, "images", "QwenImageEditPlusPipeline", SubjectOptions())


def test_several_images_to_edit_are_given_in_order(tmp_path: Path) -> None:
    """The first has the proportions of the image and its crop, the second others, and is cropped at the center."""
    for number, (folder, size) in enumerate((("images", (40, 24)), ("dog", (40, 24)), ("hat", (16, 48)))):
        (tmp_path / folder).mkdir()
        picture(min(number, 1) if folder == "hat" else 0, size).save(tmp_path / folder / "a.png")
    folders = (str(tmp_path / "dog"), str(tmp_path / "hat"))
    options = SubjectOptions(instance_data_dir=str(tmp_path / "images"), instance_prompt="x", cond_data_dir=folders)
    subject = read_subject(options, SkipList())
    data = items_of(subject, "images")
    hat = pil_to_tensor(picture(1, (16, 48))).float() / 127.5 - 1
    for entry in (data[0], data[0]):
        assert entry.given.shape == (2, 3, 16, 16)
        torch.testing.assert_close(entry.given[0], entry.inputs, rtol=0, atol=1e-6)
        torch.testing.assert_close(entry.given[1], hat[:, 16:32], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a FluxKontextPipeline edits one image: give one --cond-data-dir"):
        require_given(subject, "image", "FluxKontextPipeline", options)
    _, given = images_shown(subject, (), "images", (16, 16)) or ()
    assert given.shape == (1, 2, 3, 16, 16)


def test_pairs_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.Features({"image": datasets.Image(), "before": datasets.Image()})
    rows = {"image": [picture(0), picture(1)], "before": [picture(2), picture(3)]}
    datasets.Dataset.from_dict(rows, features=kind).save_to_disk(str(tmp_path / "data"))
    options = SubjectOptions(dataset_name=str(tmp_path / "data"), cond_image_column=("before",), instance_prompt="x")
    subject = read_subject(options, SkipList())
    pixels, given = images_shown(subject, (), "image", (24, 40)) or ()
    for number, image in enumerate((picture(2), picture(3))):
        expected = pil_to_tensor(image) / 127.5 - 1
        torch.testing.assert_close(given[number], expected.float(), rtol=0, atol=1e-6)
    assert not torch.equal(pixels, given)
    with pytest.raises(ValueError, match="--cond-image-column other: there is no such column"):
        read_subject(
            SubjectOptions(dataset_name=str(tmp_path / "data"), cond_image_column=("other",), instance_prompt="x"),
            SkipList(),
        )


def test_masks_of_the_user_and_random_ones() -> None:
    mask = Image.new("L", (40, 24))
    mask.paste(255, (0, 0, 20, 24))
    image = Image.new("RGB", (40, 24))
    image.paste((255, 255, 255), (0, 0, 20, 24))
    own = items_of(Subject("s", [image], ["x"], [mask]), "mask")
    entry = own[0]
    assert torch.equal(entry.given, (entry.inputs[:1] >= 0).float()) and entry.mask.shape == (1, 1, 1)
    loss = items_of(Subject("s", [image], ["x"], [mask]), None)[0]
    assert loss.given.numel() == 0 and torch.allclose(loss.mask, loss.inputs[:1] / 2 + 0.5, atol=0.01)
    drawn = items_of(Subject("s", [image], ["x"]), "mask")
    cached = CachedLatents(drawn, FAMILY, seed=0)
    again = CachedLatents(drawn, FAMILY, seed=0)
    found = [seeded_entry(cached, 0, "sample", number).given for number in range(40)]
    assert all(torch.equal(mask, seeded_entry(again, 0, "sample", number).given) for number, mask in enumerate(found))
    assert 8 < len({tuple(mask.flatten().tolist()) for mask in found}) <= 16
    assert len({tuple(seeded_entry(drawn, 0, "s", n).given.flatten().tolist()) for n in range(40)}) > 16


def test_random_masks_are_whole_rectangles_and_ellipses() -> None:
    random.seed(0)
    masks = [random_mask((32, 48)) for _ in range(400)]
    areas = torch.tensor([float(mask.mean()) for mask in masks])
    assert 0.17 < (areas == 1).float().mean() < 0.35
    assert areas.min() > 0.02 and {float(value) for value in torch.stack(masks).unique()} == {0.0, 1.0}

    def filled(mask: Tensor) -> float:  # the part of its bounding box that a mask covers
        rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
        return float(mask.sum()) / len(range(int(rows.min()), int(rows.max()) + 1)) / int(columns.numel())

    parts = torch.tensor([filled(mask) for mask in masks])
    assert (parts == 1).float().mean() < 0.85 and (parts < 0.85).float().mean() > 0.2


def test_prompts_that_are_seen_with_an_image_belong_to_it() -> None:
    images = [picture(number) for number in range(2)]
    subject = Subject("s", images, ["red", "red"], originals=[[picture(2)], [picture(3)]])
    options = SubjectOptions(caption_dropout_rate=0.5)
    items, prompts = make_items(subject, [], [(16, 16)], options, 0, "image", sees=True)
    assert [str(prompt) for prompt in prompts] == ["red", "red", "", ""]
    for item, (original,) in zip(items, subject.originals or (), strict=True):
        drawn = {item.draw_caption() for _ in range(20)}
        assert len(drawn) == 2
        for number in drawn:
            seen = prompts[number]
            assert isinstance(seen, Seen) and seen.images[0].tobytes() == original.tobytes()  # type: ignore[union-attr]
    same, other = (repr(prompts[item.caption]) for item in items)
    assert same == repr(make_items(subject, [], [(16, 16)], options, 0, "image", sees=True)[1][0]) != other
    assert "red" != prompts[0] != Seen("red", [picture(2)]) and with_image_of("x", "y") == "y"


def test_what_is_needed_is_asked_for() -> None:
    plain, pair = Subject("s", [picture(0)], ["x"]), Subject("s", [picture(0)], ["x"], originals=[[picture(1)]])
    with pytest.raises(ValueError, match="FluxKontextPipeline edits images: give --cond-data-dir"):
        require_given(plain, "image", "FluxKontextPipeline", SubjectOptions())
    with pytest.raises(ValueError, match="FluxPipeline edits no images"):
        require_given(pair, None, "FluxPipeline", SubjectOptions())
    prior = SubjectOptions(with_prior_preservation=True, class_prompt=("y",))
    with pytest.raises(ValueError, match="--with-prior-preservation: class images are made from text"):
        require_given(pair, "image", "FluxKontextPipeline", prior)
    require_given(plain, "mask", "FluxFillPipeline", prior)
    with pytest.raises(ValueError, match="--cond-data-dir needs --instance-data-dir"):
        SubjectOptions(cond_data_dir=("x",), dataset_name="y")
    with pytest.raises(ValueError, match="--validation-image is for pipelines that edit or inpaint"):
        images_shown(plain, ("a.png",), None, (16, 16))
    _, middle = images_shown(plain, (), "mask", (16, 16)) or ()
    assert middle.sum() == 64 and middle[0, 0, 4:12, 4:12].all()
