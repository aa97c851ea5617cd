"""The demo on pretrained towers: its pictures, and the model that it joins, with random towers in their formats."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import demo_real
from randlora_vision.integrations._open_clip_models import load_clip
from randlora_vision.training.data.options import ImageOptions
from randlora_vision.training.data.read import read_data
from randlora_vision.training.data.skipped import SkipList

WORDS = ("red", "blue", "cat", "dog")


@pytest.fixture
def data(tmp_path):
    """Prepared data with 40 emoji, whose captions are all different."""
    captions = [f"{WORDS[n % 4]} {WORDS[n // 4 % 4]} {n}" for n in range(40)]
    drawn = {artist: torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8) for artist in ("google", "twitter")}
    save_file({**drawn, "labels": torch.zeros(40, dtype=torch.long)}, tmp_path / "emoji.safetensors")
    (tmp_path / "emoji.json").write_text(json.dumps({"captions": captions, "categories": ["x"]}))
    return tmp_path


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for name, value in {"_VALIDATION": 8, "_TEST": 12, "_STEPS": 3, "_BATCH": 8}.items():
        monkeypatch.setattr(demo_real, name, value)


def test_both_artists_have_the_same_emoji_in_each_split(data, tmp_path):
    demo_real.write_emoji(data, tmp_path / "emoji")
    captions = {}
    for artist in ("google", "twitter"):
        splits = read_data(ImageOptions(data=str(tmp_path / "emoji" / artist)), SkipList())
        captions[artist] = {name: [words for (words,) in held] for name, held in splits.captions.items()}
    assert captions["google"] == captions["twitter"]
    assert {name: len(held) for name, held in captions["google"].items()} == {"train": 20, "val": 8, "test": 12}
    assert len({words for held in captions["google"].values() for words in held}) == 40


@pytest.mark.slow
def test_the_joined_model_is_its_towers_with_the_learned_projections(data, tmp_path):
    import timm
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    vision = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=70)
    save_file(vision.state_dict(), data / "dinov2.safetensors")
    folder = data / "minilm"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(40))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(vocabulary), **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    demo_real.write_model(data, model, model)
    clip = load_clip(f"local-dir:{model}", None, seed=0)
    clip.model.eval()
    text = BertModel.from_pretrained(folder).eval()
    tokens = clip.tokenize(["red cat 7", "dog"])
    assert tokens.shape == (2, demo_real.CONTEXT)
    with torch.no_grad():
        hidden = text(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        mask = (tokens != 0).unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(clip.model.encode_text(tokens), pooled @ clip.model.text.proj.weight.T)
        pictures = torch.randn(2, 3, demo_real.PIXELS, demo_real.PIXELS)
        features = demo_real.load_dinov2(data, demo_real.PIXELS).eval()(pictures)
        torch.testing.assert_close(clip.model.encode_image(pictures), features @ clip.model.visual.head.proj.weight.T)
    assert not torch.equal(clip.model.text.proj.weight, torch.eye(384))
