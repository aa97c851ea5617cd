"""Captions with a trigger word, shuffled tags and dropout."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image

from randlora_vision.training.dreambooth.batches import CachedLatents, CaptionedPixels, diffusion_batches
from randlora_vision.training.dreambooth.captions import orders_of, with_trigger
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.subject import Subject, make_items


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat, outdoors", "sks, a cat, outdoors"),
        ("a photo of sks dog", "a photo of sks dog"),
        ("SKS, a cat", "SKS, a cat"),
        ("a sksy thing", "sks, a sksy thing"),
        ("", "sks"),
    ],
)
def test_the_trigger_word_begins_a_caption_without_it(caption: str, expected: str) -> None:
    assert with_trigger(caption, "sks") == expected
    assert with_trigger(caption, None) == caption


def test_orders_of_tags() -> None:
    every = {", ".join(("sks", *rest)) for rest in itertools.permutations(("a", "b b", "c"))}
    found = orders_of("sks, a, b b, c", keep=1, seed=0)
    assert found[0] == "sks, a, b b, c" and set(found) <= every and len(set(found)) == len(found) > 3
    assert found == orders_of("sks, a, b b, c", keep=1, seed=0) != orders_of("sks, a, b b, c", keep=1, seed=1)
    assert orders_of("one sentence", keep=0, seed=0) == ["one sentence"]


class Family:
    """Stands for a pipeline whose latents are the pixels."""

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


@pytest.mark.parametrize("cached", [True, False])
def test_captions_are_drawn_at_every_step_by_the_seed(cached: bool) -> None:
    options = SubjectOptions(shuffle_caption=True, keep_tokens=1, caption_dropout_rate=0.25)
    subject = Subject("x", [Image.new("RGB", (8, 8))] * 2, ["sks, a, b, c", "plain"])
    items, prompts = make_items(subject, [(Image.new("RGB", (8, 8)), "class")], [(8, 8)], options, 0)
    pixels = CaptionedPixels(items, center_crop=True)
    family: Any = Family()
    data = CachedLatents(pixels, family, seed=0) if cached else pixels

    def drawn(seed: int) -> list[list[str]]:
        loader = diffusion_batches(data, 2, 100, seed=seed, workers=0)
        return [[prompts[place] for place in batch["captions"].tolist()] for batch in loader]

    batches = drawn(0)
    assert batches == drawn(0) != drawn(1)
    counts = Counter(text for batch in batches for text in batch[:2])
    assert 0.15 < counts[""] / 200 < 0.35
    assert sum(counts[text] for text in counts if text.startswith("sks, ")) + counts["plain"] + counts[""] == 200
    assert len([text for text in counts if text.startswith("sks, ")]) == 6  # the orders of three tags
    assert {text for batch in batches for text in batch[2:]} == {"class"}  # the class keeps its caption
    assert [prompts[data[index].caption] for index in range(2)] == subject.captions  # evaluation does as well
    plain, _ = make_items(subject, [], [(8, 8)], SubjectOptions(), 0)
    state = random.getstate()
    assert [item.draw_caption() for item in plain] == [0, 1] and random.getstate() == state
