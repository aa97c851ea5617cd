"""The offline tokenizers give open_clip's ids and survive saving; the tiny pipelines build, save and sample."""

from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from benchmarks.clip_vocabulary import clip_tokenizer
from tests.tiny_pipelines import CONTEXT, PIPELINES, sample, t5_tokenizer

TEXTS = ["a photo of sks digit", "", "isn't THIS   crazy? 12 h\u00e9llo", "a very " + "long " * 20]


def test_clip_ids_are_those_of_open_clip() -> None:
    ids = clip_tokenizer(CONTEXT)(TEXTS, truncation=True, max_length=CONTEXT)["input_ids"]
    expected = open_clip.SimpleTokenizer(context_length=CONTEXT)(TEXTS)
    assert len(ids) == len(TEXTS)
    for found, row in zip(ids, expected.tolist(), strict=True):
        assert found == row[: len(found)] and not any(row[len(found) :])


def test_t5_takes_known_words_whole_and_spells_the_others() -> None:
    tokenizer = t5_tokenizer(CONTEXT, ["photo", "of", "photo"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("photo of ox \u00e9")["input_ids"])
    assert tokens == ["\u2581photo", "\u2581of", "\u2581", "o", "x", "\u2581", "<unk>", "</s>"]


def test_tokenizers_survive_saving(tmp_path: Path) -> None:
    for kind, tokenizer in ((CLIPTokenizer, clip_tokenizer(CONTEXT)), (T5Tokenizer, t5_tokenizer(CONTEXT, ["photo"]))):
        tokenizer.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__, local_files_only=True)
        options = dict(padding="max_length", truncation=True)
        assert loaded(TEXTS, **options)["input_ids"] == tokenizer(TEXTS, **options)["input_ids"]
        assert loaded.model_max_length == CONTEXT


@pytest.mark.parametrize("family", PIPELINES)
def test_tiny_pipelines_sample_and_survive_saving(family: str, tmp_path: Path) -> None:
    pipe = PIPELINES[family]()
    image = sample(pipe)
    assert torch.equal(sample(PIPELINES[family]()), image)
    assert (sample(pipe, prompt="a dog") - image).abs().max() > 0.01
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(sample(loaded), image, atol=1e-5)
