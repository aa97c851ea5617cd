from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from randlora_vision.training.data.batches import evaluation_batches, training_batches
from randlora_vision.training.data.captioned import (
    CaptionedImages,
    PairSplits,
    class_captions,
    token_number,
    truncated_captions,
)
from randlora_vision.training.data.options import SplitOptions
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.splits import training_part
from randlora_vision.training.harness.seeding import seeded_items

CAPTIONS = [("a cat", "one cat", "cat!"), ("a dog",), ("a cat",), ("two dogs", "dogs")]


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[*text.encode(), *bytes(20 - len(text))] for text in texts])


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).rstrip(b"\0").decode()


def captioned(draw: bool = True, **more: Any) -> CaptionedImages:
    images = [Image.new("RGB", (2, 2), (i, i, i)) for i in range(4)]
    return CaptionedImages(images, CAPTIONS, to_tensor, tokenize, SkipList(), draw=draw, **more)


def test_a_batch_holds_images_captions_numbers_and_places() -> None:
    (batch,) = evaluation_batches(captioned(draw=False), 4, workers=0)
    assert [text_of(tokens) for tokens in batch["tokens"]] == ["a cat", "a dog", "a cat", "two dogs"]
    assert batch["indices"].tolist() == [0, 1, 2, 3]
    assert (batch["images"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3]
    first, other, second, _ = batch["captions"].tolist()
    assert first == second != other
    assert batch["images"].dtype == torch.float32 and batch["tokens"].dtype == batch["captions"].dtype == torch.int64


def test_numbers_are_the_tokens_own() -> None:
    """Captions that are equal to the model have equal numbers, by open_clip's own tokenizer."""
    tokenizer = open_clip.SimpleTokenizer(context_length=6)
    same = ["a dog", "A Dog", "a  dog ", "a d&#111;g"]
    long = ["one two three four five six", "one two three four five seven"]
    other = ["a cat", "dog a", "a dog.", "one two three five four six", ""]
    numbers = [token_number(row) for row in tokenizer([*same, *long, *other])]
    assert len(set(numbers[:4])) == 1 and numbers[4] == numbers[5]
    assert len(set(numbers)) == 2 + len(other) and all(0 <= number < 2**63 for number in numbers)
    assert token_number(torch.tensor([1, 2])) == 5427373809508506450  # the same in every process and release
    assert token_number(torch.tensor([1, 2], dtype=torch.int32)) == token_number(torch.tensor([1, 2]))


def test_captions_are_drawn_by_the_seed_alone_and_all_of_them() -> None:
    def drawn(seed: int, workers: int = 0) -> list[str]:
        loader = seeded_items(training_batches(captioned(), 4, 6, seed=0, workers=workers), seed)
        return [text_of(tokens) for batch in loader for tokens in batch["tokens"]]

    first = drawn(0)
    assert first == drawn(0) == drawn(0, workers=2) != drawn(1)
    assert set(first) == {text for captions in CAPTIONS for text in captions}


def test_every_pass_has_every_image_once() -> None:
    batches = list(training_batches(captioned(), batch_size=6, batches=4, seed=3, workers=0))
    assert [len(batch["indices"]) for batch in batches] == [6] * 4
    order = [index for batch in batches for index in batch["indices"].tolist()]
    assert Counter(order) == {index: 6 for index in range(4)}
    for start in range(0, 24, 4):
        assert sorted(order[start : start + 4]) == [0, 1, 2, 3]


def test_evaluation_reads_in_order_with_the_first_caption() -> None:
    batches = list(evaluation_batches(captioned(draw=False), batch_size=3, workers=0))
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1, 2], [3]]
    assert [text_of(tokens) for batch in batches for tokens in batch["tokens"]] == [texts[0] for texts in CAPTIONS]


def test_every_text_with_the_place_of_its_image() -> None:
    every = captioned().texts
    assert every.texts == ["a cat", "one cat", "cat!", "a dog", "a cat", "two dogs", "dogs"]
    assert every.images == [0, 0, 0, 1, 2, 3, 3]
    assert every.numbers == every.tokens == [token_number(row) for row in tokenize(every.texts)]
    assert captioned(groups=[7, 8, 7, 9]).texts.numbers == [7, 7, 7, 8, 7, 9, 9]


def test_an_unreadable_image_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    skipped = SkipList(tmp_path / "skipped.txt")
    data = CaptionedImages(
        [tmp_path / "text.png", Image.new("RGB", (2, 2))], [["a"], ["b"]], to_tensor, tokenize, skipped
    )
    (batch,) = evaluation_batches(data, 2, workers=0)
    assert batch["indices"].tolist() == [1] and text_of(batch["tokens"][0]) == "b"
    assert skipped.count() == 1


def test_classes_as_captions() -> None:
    """Prompts of one class mean the same whatever their words; those of two classes never do."""
    splits = digits.read_digits((3, 5))
    pairs = class_captions(splits, ("a {}.", "the number {}"))
    assert pairs.captions["train"][0] in (("a three.", "the number three"), ("a five.", "the number five"))
    data = pairs.select("train", to_tensor, tokenize, SkipList())
    items = [data[0] for _ in range(20)]
    assert len({text_of(item[1]) for item in items if item}) == 2 and len({item[2] for item in items if item}) == 1
    assert data.texts.numbers[::2] == list(splits.labels["train"])
    assert pairs.augment is splits.augment and pairs.record()["sizes"] == splits.record()["sizes"]
    assert not pairs.select("val", to_tensor, tokenize, SkipList()).draw


def test_classes_that_are_equal_to_the_model_are_one_group() -> None:
    """A tokenizer that lowers the case cannot tell Polish from polish."""
    splits = digits.read_digits((3, 5, 7))
    splits = replace(splits, class_names=["Polish", "five", "polish"])
    pairs = class_captions(splits, ("a {}.", "the {}"), open_clip.tokenize)
    assert pairs.groups is not None and set(pairs.groups["train"]) == {0, 1}
    for label, group in zip(splits.labels["train"], pairs.groups["train"], strict=True):
        assert group == (0, 1, 0)[label]


def test_a_part_of_the_pairs_keeps_every_image_with_its_class() -> None:
    pairs = class_captions(digits.read_digits((3, 5)), ("a {}.",))
    part = training_part(pairs, SplitOptions(train_fraction=0.3))
    assert part.groups is not None and 0 < len(part.images["train"]) < len(pairs.images["train"])
    assert [("a three.", "a five.")[group] for group in part.groups["train"]] == [c for (c,) in part.captions["train"]]


@pytest.mark.parametrize("context", [8, 12])
def test_captions_that_the_context_cuts_are_counted(context: int) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    texts = ["cat", "a photo of a cat", "one two three four five six", "a b c d e f g h i j", "日本語のキャプション"]
    texts += [" ".join("xyz"[: n % 4] or "q" for n in range(count)) for count in range(4, 14)]
    truth = sum(len(tokenizer.encode(text)) + 2 > context for text in texts)
    assert 0 < truth < len(texts)
    captions = {"train": [texts[:9], texts[3:9]], "val": [texts[9:]], "test": [texts[9:]]}
    splits = PairSplits(name="x", images={split: [] for split in captions}, captions=captions, origin="")
    assert truncated_captions(splits, tokenizer) == truth


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, "1", 0), (2, "1", 1), (16, "1", 4), (16, "8", 1), (2, "2", 0), (2, "4", 0)]
)
def test_processes_that_load(cores: int, processes: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    decoded, files = captioned(), captioned()
    files.images = [Path("x.png")] * 4
    for loader in (training_batches, evaluation_batches):
        more = {"batches": 1, "seed": 0} if loader is training_batches else {}
        assert loader(decoded, batch_size=2, workers=None, **more).num_workers == 0
        assert loader(files, batch_size=2, workers=None, **more).num_workers == expected
        assert loader(files, batch_size=2, workers=0, **more).num_workers == 0
        assert loader(decoded, batch_size=2, workers=1, **more).num_workers == 1
