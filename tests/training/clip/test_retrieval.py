from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from randlora_vision.training.clip.contrastive import ContrastiveLoss
from randlora_vision.training.clip.retrieval import Features, retrieval_features
from randlora_vision.training.data.batches import evaluation_batches
from randlora_vision.training.data.captioned import PairSplits, class_captions
from randlora_vision.training.data.skipped import SkipList
from tests.training_helpers import NO_SKIPS, tiny_clip

DIRECTIONS = ("image_to_text", "text_to_image")


def features(images: Any, texts: Any, pairs: list[tuple[int, int]], numbers: list[int] | None = None) -> Features:
    """Make features of rows; `pairs` are (image, text)."""
    images, texts = (torch.as_tensor(rows, dtype=torch.float32) for rows in (images, texts))
    return Features(
        images=images,
        indices=torch.arange(len(images)),
        words=[f"text {number}" for number in range(len(texts))],
        texts=texts,
        numbers=torch.tensor(numbers or list(range(len(texts)))),
        image_of=torch.tensor([image for image, _ in pairs]),
        text_of=torch.tensor([text for _, text in pairs]),
    )


def test_a_perfect_model_finds_everything() -> None:
    found = features(torch.eye(12), torch.eye(12), [(i, i) for i in range(12)]).recalls()
    assert found == {f"{way}_r{k}": 1.0 for way in DIRECTIONS for k in (1, 5, 10)} | {"mean_recall": 1.0}


def test_ranks_in_closed_form() -> None:
    """Image i is most similar to text i + 1 (mod 12), then to text i, so the correct one always ranks second."""
    likeness = torch.eye(12) + 2 * torch.eye(12).roll(1, dims=1)
    found = features(torch.eye(12), likeness.T, [(i, i) for i in range(12)])
    assert found.text_ranks().tolist() == [1] * 12 and found.image_ranks().tolist() == [1] * 12
    values = found.recalls()
    assert [values[f"image_to_text_r{k}"] for k in (1, 5, 10)] == [0.0, 1.0, 1.0]
    assert values["mean_recall"] == pytest.approx(4 / 6)


def test_one_right_caption_of_several_is_enough_for_an_image() -> None:
    texts = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]  # two captions each
    found = features([[1.0, 0.0], [0.0, 1.0]], texts, [(0, 0), (0, 1), (1, 2), (1, 3)])
    assert found.text_ranks().tolist() == [0, 0]
    assert found.image_ranks().tolist() == [0, 1, 0, 0]  # the second caption is nearer to the other image
    values = found.recalls()
    assert values["image_to_text_r1"] == 1.0 and values["text_to_image_r1"] == 0.75


def test_equal_features_find_nothing() -> None:
    found = features(torch.ones(30, 4), torch.ones(30, 4), [(i, i) for i in range(30)]).recalls()
    assert set(found.values()) == {0.0}
    broken = features(torch.full((30, 4), torch.nan), torch.ones(30, 4), [(i, i) for i in range(30)]).recalls()
    assert set(broken.values()) == {0.0}


def test_captions_that_mean_the_same_are_right_for_both_images() -> None:
    """Four images of two classes; each has its own text, nearest to the other image of its class."""
    images = torch.eye(4)
    texts = images[[1, 0, 3, 2]]
    pairs = [(i, i) for i in range(4)]
    apart = features(images, texts, pairs).recalls()
    classes = features(images, texts, pairs, numbers=[7, 7, 9, 9]).recalls()
    assert apart["image_to_text_r1"] == apart["text_to_image_r1"] == 0.0
    assert classes["image_to_text_r1"] == classes["text_to_image_r1"] == 1.0


def test_a_text_of_many_images_is_one_candidate_and_many_queries() -> None:
    """Text 0 is the caption of images 0 to 2, text 1 that of image 3; image 3 and text 1 both rank theirs last."""
    images = [[1.0, 0.0]] * 3 + [[0.8, 0.6]]
    found = features(images, [[1.0, 0.0], [0.9, 0.1]], [(0, 0), (1, 0), (2, 0), (3, 1)])
    assert found.text_ranks().tolist() == [0, 0, 0, 1]  # not 3: the wrong text is a single candidate
    assert found.image_ranks().tolist() == [0, 3]
    assert found.recalls()["text_to_image_r1"] == 0.75


def numpy_recall(images: Any, texts: Any, right: Any, k: int) -> float:
    """The fraction of rows with a correct column among the k most similar, by a full sort."""
    order = np.argsort(-(images @ texts.T), axis=1)[:, :k]
    return float(np.mean([right[row, columns].any() for row, columns in enumerate(order)]))


def test_recall_equals_a_full_sort() -> None:
    """More images than one chunk, with one to four captions each, some of which have the same meaning."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(300), rng.integers(1, 5, 300))
    meanings = np.where(rng.random(len(owners)) < 0.2, rng.integers(0, 40, len(owners)), 1000 + np.arange(len(owners)))
    images = rng.standard_normal((300, 16)).astype(np.float32)
    texts = (images[owners] + 2 * rng.standard_normal((len(owners), 16))).astype(np.float32)
    right = np.array([np.isin(meanings, meanings[owners == image]) for image in range(300)])
    found = features(images, texts, [(int(o), t) for t, o in enumerate(owners)], meanings.tolist()).recalls()
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(numpy_recall(images, texts, right, k))
        assert found[f"text_to_image_r{k}"] == pytest.approx(numpy_recall(texts, images, right.T, k))
    assert 0.1 < found["image_to_text_r1"] < found["image_to_text_r10"] < 0.95


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_split_is_encoded_whole_and_unreadable_images_are_left_out(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "tiny")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [*pictures(5), tmp_path / "broken.png"]
    captions = [["a one", "the one"], ["a two"], ["three", "a one"], ["four"], ["five"], ["lost"]]
    splits = PairSplits(name="pairs", images={"test": images}, captions={"test": captions}, origin="")
    data = splits.select("test", clip.eval_transform, clip.tokenize, SkipList(tmp_path / "skipped.txt"), draw=False)
    found = retrieval_features(clip.model, data, batch_size=2, workers=0)
    assert found.words == ["a one", "the one", "a two", "three", "four", "five"]
    assert [(i, found.words[t]) for i, t in zip(found.image_of.tolist(), found.text_of.tolist(), strict=True)] == [
        (image, text) for image, texts in enumerate(captions[:5]) for text in texts
    ]
    with torch.no_grad():
        stacked = torch.stack([clip.eval_transform(image) for image in images[:5]])  # type: ignore[arg-type]
        expected = clip.model.encode_image(stacked, normalize=True), clip.model.encode_text(clip.tokenize(found.words))
    torch.testing.assert_close(found.images, expected[0])
    torch.testing.assert_close(found.texts, F.normalize(expected[1], dim=-1))
    text, right = found.nearest(2)
    likest = int((found.texts @ found.images[2]).argmax())
    assert text == found.words[likest] and right == (text in ("three", "a one"))
    assert not clip.model.training


def test_captions_made_of_classes_are_measured_by_their_class(tmp_path: Path) -> None:
    from randlora_vision.training.data.sources import digits

    clip = tiny_clip(tmp_path / "tiny")
    splits = class_captions(digits.read_digits(range(3)), ["a {}", "the {}"])
    data = splits.select("val", clip.eval_transform, clip.tokenize, NO_SKIPS, draw=False)
    found = retrieval_features(clip.model, data, batch_size=32, workers=0)
    assert len(found.words) == 6 and len(found.text_of) == 2 * len(data)
    values = found.recalls()
    assert values["image_to_text_r5"] == 1.0  # at most four of the six are wrong
    assert 0 < values["text_to_image_r1"] <= 1


def test_captions_that_are_equal_to_the_model_are_one_candidate(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "tiny")
    words = " ".join("x" * 20)  # beyond the context of 12 tokens
    captions = [["a dog"], ["A Dog"], ["a d&#111;g"], ["a cat"], [f"{words} one"], [f"{words} two"]]
    splits = PairSplits(name="pairs", images={"test": pictures(6)}, captions={"test": captions}, origin="")
    data = splits.select("test", clip.eval_transform, clip.tokenize, NO_SKIPS, draw=False)
    found = retrieval_features(clip.model, data, batch_size=4, workers=0)
    assert found.words == ["a dog", "a cat", f"{words} one"]
    assert found.text_of.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.values["texts"] == 3 and found.values["captions"] == found.values["images"] == 6
    (batch,) = evaluation_batches(data, 6, workers=0)
    first, second, third, other, *long = batch["captions"].tolist()
    assert first == second == third != other and long[0] == long[1]


def test_a_batch_of_unreadable_images_is_not_measured(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "tiny")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [*pictures(2), *[tmp_path / "broken.png"] * 2, pictures(3)[2]]
    splits = PairSplits(
        name="pairs", images={"test": images}, captions={"test": [[f"number {n}"] for n in range(5)]}, origin=""
    )
    data = splits.select("test", clip.eval_transform, clip.tokenize, NO_SKIPS, draw=False)
    found = retrieval_features(clip.model, data, batch_size=2, workers=0)
    assert found.indices.tolist() == [0, 1, 4] and found.words == ["number 0", "number 1", "number 4"]
    assert found.values["images"] == 3


@pytest.mark.parametrize("contrast", ["clip", "siglip"])
def test_the_loss_of_all_pairs_at_a_time_is_that_of_one_batch(contrast: Any) -> None:
    from tests.training.clip.test_contrastive import REPEATED, Towers, plain_loss

    loss = ContrastiveLoss(Towers(), contrast)
    with torch.no_grad():
        features = loss.features(REPEATED)
        expected = plain_loss(contrast, loss.clip, *features, REPEATED["captions"]).item()
    captions, owners = REPEATED["captions"], REPEATED["indices"]
    assert loss.mean_loss(*features, captions, owners, len(captions)) == pytest.approx(expected, rel=1e-5)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
    parts = [
        plain_loss(contrast, loss.clip, features[0][rows], features[1][rows], captions[rows]).item() * len(rows)
        for rows in order.split(3)
    ]
    assert loss.mean_loss(*features, captions, owners, 3) == pytest.approx(sum(parts) / len(captions), rel=1e-5)
