"""Tests of subject images and captions, class images, and temporarily loaded files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image
from transformers import PreTrainedModel

from randlora_vision.integrations.diffusers import load_adapter
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.dreambooth.class_images import ClassImages
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.families import FAMILIES
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.methods import adapt
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import (
    DreamBoothAdapterOptions,
    DreamBoothOptions,
    PipelineOptions,
    SubjectOptions,
)
from randlora_vision.training.dreambooth.samples import Sampler
from randlora_vision.training.dreambooth.subject import Subject, make_items, read_subject
from tests.tiny_pipelines import CONTEXT, sample, sd15


def folder_of(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    root.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number, 0, 0)).save(root / name)
    return root


def test_captions_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", "a.png", "b.jpg", "c.png", "d.png")
    (folder / "b.txt").write_text(" of b\n")
    (folder / "notes.md").write_text("no image")
    lines = [{"file_name": "c.png", "text": "of c"}, {"file_name": "b.jpg", "text": "other"}]
    lines += [{"file_name": "d.png", "caption": "of d"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    subject = read_subject(SubjectOptions(instance_data_dir=str(folder), instance_prompt="all"), SkipList())
    assert [path.name for path in subject.images if isinstance(path, Path)] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert subject.captions == ["all", "of b", "of c", "of d"]
    assert subject.record()["captions"] == subject.captions


@pytest.mark.parametrize("split", [True, False])
def test_captions_of_a_dataset(split: bool, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    pictures = [Image.new("RGB", (4, 6), (i, 0, 0)) for i in range(3)]
    data = Dataset.from_dict({"photo": pictures, "words": ["one", "two", "three"]})
    (DatasetDict({"test": data.select([0]), "train": data}) if split else data).save_to_disk(str(tmp_path / "d"))
    options = SubjectOptions(dataset_name=str(tmp_path / "d"), image_column="photo", caption_column="words")
    subject = read_subject(options, SkipList())
    assert subject.captions == ["one", "two", "three"]
    items, prompts = make_items(subject, [], [(8, 8)], options, 0)
    assert [prompts[item.caption] for item in items] == subject.captions
    assert [image.open().getpixel((0, 0)) for image in subject.images] == [(i, 0, 0) for i in range(3)]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"--caption-column word: .* has the columns photo, words"):
        read_subject(
            SubjectOptions(dataset_name=str(tmp_path / "d"), image_column="photo", caption_column="word"), SkipList()
        )
    with pytest.raises(ValueError, match="--image-column image"):
        read_subject(SubjectOptions(dataset_name=str(tmp_path / "d"), instance_prompt="x"), SkipList())


def test_items_go_to_their_buckets_and_every_bucket_has_the_class(tmp_path: Path) -> None:
    wide = folder_of(tmp_path, "w.png", size=(40, 20)) / "w.png"
    tall = folder_of(tmp_path, "t.png", size=(20, 44)) / "t.png"
    buckets = [(16, 16), (16, 32), (32, 16)]
    subject = Subject("x", [wide, tall, wide, tall], ["a", "b", "b", "c"])
    items, prompts = make_items(subject, [(wide, "class"), (tall, "other")], buckets, SubjectOptions(), 0)
    assert prompts == ["a", "b", "c", "class", "other"]
    assert [(item.bucket, item.caption, item.prior) for item in items[:4]] == [
        ((16, 32), 0, False),
        ((32, 16), 1, False),
        ((16, 32), 1, False),
        ((32, 16), 2, False),
    ]
    prior = items[4:]
    assert len(prior) == 4 and all(item.prior for item in prior)
    assert {item.bucket for item in prior} == {(16, 32), (32, 16)}
    assert {(str(item.image), prompts[item.caption]) for item in prior} == {(str(wide), "class"), (str(tall), "other")}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd15()


def test_images_of_the_class_are_filled_up(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(), CONTEXT)
    sampler = Sampler(family, (16, 16), at_once=2, autocast=contextlib.nullcontext, steps=1, guidance=1.0)
    options = SubjectOptions(with_prior_preservation=True, class_prompt=("a digit", "a seven"), num_class_images=5)

    def made_in(folder: Path, options: SubjectOptions = options) -> list[tuple[Path, str]]:
        found = ClassImages(options, folder, sampler, Accelerator(), SkipList())
        monkeypatch.setattr(sampler, "encode", None)  # prompts are encoded before the denoiser is loaded
        found.make()
        monkeypatch.undo()
        return found.images

    assert made_in(tmp_path / "none", SubjectOptions()) == []
    made, captions = zip(*made_in(tmp_path / "a"), strict=True)
    assert [path.name for path in made] == [f"made-{number:05}.png" for number in range(5)]
    assert captions == ("a digit", "a seven", "a digit", "a seven", "a digit")
    contents = [path.read_bytes() for path in made]
    assert len(set(contents)) == 5
    generator = torch.Generator().manual_seed(3)
    size = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0}
    expected = pipe("a seven", generator=generator, **size).images[0]
    with Image.open(made[3]) as image:
        difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(expected.tobytes()))
    assert difference.abs().max() <= 1
    made[1].unlink()  # interrupted
    made[3].unlink()
    assert [path.read_bytes() for path, _ in made_in(tmp_path / "a")] == contents
    own = folder_of(tmp_path / "b", "made.png", "x.png", "y.png")
    (own / "x.txt").write_text("an x")
    found = [(path.name, caption) for path, caption in made_in(own)]
    assert found[:2] == [("made-00000.png", "a digit"), ("made-00001.png", "a seven")]
    assert found[2:] == [("made.png", "a digit"), ("x.png", "an x"), ("y.png", "a digit")]


def test_the_empty_prompt_is_a_prompt_of_the_class_and_broken_class_images_are_made_up_for(
    pipe: Any, tmp_path: Path
) -> None:
    """Guidance compares every picture with that of the empty prompt: an image made for it must keep it as caption."""
    family = FAMILIES[type(pipe).__name__](pipe, ObjectiveOptions(), CONTEXT)
    sampler = Sampler(family, (16, 16), at_once=4, autocast=contextlib.nullcontext, steps=1, guidance=2.0)
    options = SubjectOptions(with_prior_preservation=True, class_prompt=("a digit", ""), num_class_images=4)
    for broken in ("a.png", "b.png"):
        (tmp_path / broken).write_bytes(b"?")
    os.mkfifo(tmp_path / "c.png")
    skipped = SkipList(tmp_path.with_suffix(".skipped"))
    for _ in range(2):
        of_class = ClassImages(options, tmp_path, sampler, Accelerator(), skipped)
        of_class.make()
        assert [(path.name, caption) for path, caption in of_class.images] == [
            (f"made-{number:05}.png", ("a digit", "")[number % 2]) for number in range(4)
        ]
    assert skipped.count() == 3


def test_a_pipeline_is_loaded_in_the_dtype_asked_for_and_its_vae_in_float32(tmp_path: Path) -> None:
    sd15().save_pretrained(tmp_path)
    pipe = load_family(str(tmp_path), ObjectiveOptions(), dtype=torch.bfloat16).pipe
    assert {p.dtype for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    family = load_family(str(tmp_path), ObjectiveOptions(), dtype=torch.bfloat16, text_first=True)
    family.move(torch.device("cpu"))
    assert all(p.is_meta for p in family.denoiser.parameters()) and family.dtype == torch.bfloat16
    assert family.encode(["a dog"])["prompt_embeds"].std() > 0
    family.drop_text_encoders()
    family.load_denoiser()
    same, found = pipe.unet.state_dict(), family.denoiser.state_dict()
    assert same.keys() == found.keys() and all(torch.equal(same[name], found[name]) for name in same)
    assert not any(p.requires_grad for p in family.denoiser.parameters()) and not family.denoiser.training


@pytest.mark.parametrize("method", ["randlora", "lora", "full"])
def test_a_file_replaces_the_weights_for_a_while(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("this version of PEFT is not compatible")

    # transformers may refuse the installed version of PEFT, so nothing may depend on the wrappers of the hosts.
    for host in (ModelMixin, PreTrainedModel):
        for name in ("add_adapter", "load_adapter", "set_adapter", "delete_adapter"):
            monkeypatch.setattr(host, name, refuse, raising=False)
    trained, other = sd15(), sd15()
    adapter = DreamBoothAdapterOptions(method=method, rank=4, alpha=80.0)
    options = DreamBoothOptions(adapter=adapter, pipeline=PipelineOptions(train_text_encoder=True))
    adaptation = adapt(FAMILIES[type(trained).__name__](trained, ObjectiveOptions(), CONTEXT), resolve(options))

    def move(by: float) -> None:
        torch.manual_seed(2)
        with torch.no_grad():
            for _, parameter in adaptation.parameters():
                parameter.add_(by * torch.randn_like(parameter))

    start = sample(trained)
    move(0.02)
    moved = sample(trained)
    adaptation.save(tmp_path / "a.safetensors")
    adaptation.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(sample(other), moved, rtol=0, atol=1e-5)
    move(-0.01)
    before = {name: parameter.detach().clone() for name, parameter in adaptation.parameters()}
    now = sample(trained)
    assert min((moved - start).abs().max(), (now - moved).abs().max()) > 1e-3
    with adaptation.with_saved(tmp_path / "a.safetensors"):
        torch.testing.assert_close(sample(trained), moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(trained), now, rtol=0, atol=1e-5)
    after = dict(adaptation.parameters())
    assert all(torch.equal(after[name], value) and after[name].requires_grad for name, value in before.items())
    parts = [trained.unet, trained.text_encoder]
    learning = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert learning == {id(parameter) for parameter in after.values()}
    if method == "randlora":
        load_adapter(other, tmp_path / "a.safetensors", "again")
