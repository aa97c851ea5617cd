"""Encodings kept on disk: the same numbers, and none for other content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_vision.training.dreambooth.batches import CachedLatents, CaptionedPixels, Item, Prompts
from randlora_vision.training.dreambooth.families import FAMILIES
from randlora_vision.training.dreambooth.kept import Kept
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import SubjectOptions
from randlora_vision.training.dreambooth.samples import as_image
from tests.tiny_families import qwen_image

TEXTS = ["a photo of sks digit", "a dog", "sks"]


def test_what_is_kept_is_used_again_for_the_same_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = qwen_image()
    family = FAMILIES["QwenImagePipeline"](pipe, ObjectiveOptions(), 64)
    torch.manual_seed(0)
    items = [Item(as_image(torch.rand(3, 16, 16)), caption=0, bucket=(16, 16), prior=False) for _ in range(2)]
    pixels = CaptionedPixels(items, center_crop=True)
    made = {"moments": 0, "encode": 0}
    for name in made:
        method = getattr(family, name)

        def counted(*given: Any, name: str = name, method: Any = method) -> Any:
            made[name] += 1
            return method(*given)

        monkeypatch.setattr(family, name, counted)

    def encodings(kept: Kept | None, texts: list[str] = TEXTS) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        prompts = Prompts(family, texts, trained=False, at_once=2, kept=kept)
        assert prompts.cached is not None
        return [entry.inputs for entry in CachedLatents(pixels, family, 0, kept).entries], prompts.cached

    latents, texts = encodings(None)
    for expected in ({"moments": 4, "encode": 4}, {"moments": 4, "encode": 4}):  # made once, then read
        found, encoded = encodings(Kept(tmp_path / "kept"))
        assert made == expected and all(map(torch.equal, found, latents))
        assert texts.keys() == encoded.keys() and all(torch.equal(texts[name], encoded[name]) for name in texts)
    assert len(list((tmp_path / "kept").iterdir())) == 4
    encodings(Kept(tmp_path / "kept"), [*TEXTS[:2], "other"])
    assert made == {"moments": 4, "encode": 5}
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias.add_(0.1)
        pipe.text_encoder.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    encodings(Kept(tmp_path / "kept"))
    assert made == {"moments": 6, "encode": 7}  # other weights
    with pytest.raises(ValueError, match="--cache-to-disk needs --cache-latents"):
        SubjectOptions(cache_to_disk="x", cache_latents=False)
