from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.training.clip.classifier import belongs_to
from randlora_vision.training.clip.methods import checkpoint_towers
from randlora_vision.training.clip.options import ClipOptions, ModelOptions, Towers
from randlora_vision.training.harness.memory import checkpoint_activations, on_device
from tests.training_helpers import tiny_clip

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(model: Any, towers: Towers | None, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of one step, and the number of values saved for the backward pass."""
    if towers is not None:
        checkpoint_towers(model, ClipOptions(clip=ModelOptions(model="tiny", towers=towers)))
    inject(model, RandLoRAConfig(rank=4, target_modules="open_clip:both"))
    model.train()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        images, texts = model.encode_image(IMAGES, normalize=True), model.encode_text(tokens, normalize=True)
        loss = (images @ texts.T).square().sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


def test_computing_activations_again_changes_no_gradient(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "tiny")
    tokens = clip.tokenize(["a", "b"])
    plain, all_kept = gradients(clip.model, None, tokens)
    kept = {}
    for towers in ("vision", "text", "both"):
        again, kept[towers] = gradients(tiny_clip(tmp_path / "tiny").model, towers, tokens)
        assert plain.keys() == again.keys() and all(torch.equal(again[name], plain[name]) for name in plain)
    assert kept["both"] < all_kept / 2


def test_a_timm_model_computes_activations_again() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    checkpoint_activations(model, "the backbone")
    assert model.grad_checkpointing


TEXT = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}


def test_models_that_cannot_are_refused() -> None:
    with pytest.raises(ValueError, match="--gradient-checkpointing: the backbone of this Xception has no blocks"):
        checkpoint_activations(timm.create_model("legacy_xception", num_classes=2), "the backbone")
    with pytest.raises(ValueError, match="the backbone of this Linear has no blocks"):
        checkpoint_activations(nn.Linear(2, 2), "the backbone")
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=resnet, text_cfg=TEXT)
    checkpoint_activations(model, "the text tower", lambda name: belongs_to(name, "text"))
    with pytest.raises(ValueError, match="the vision tower of this CLIP has no blocks"):  # takes the call, does nothing
        checkpoint_activations(model, "the vision tower", lambda name: belongs_to(name, "vision"))


@pytest.mark.parametrize("adapted", [False, True])
def test_channels_last_changes_the_order_and_nothing_else(adapted: bool) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 2))
        return model.double()

    plain, ordered = network(), on_device(network(), torch.device("cpu"), channels_last=True)
    for model in (plain, ordered):
        if adapted:
            inject(model, RandLoRAConfig(rank=2, target_modules="all", init="gamma-zero"))
        model(IMAGES.double()).square().sum().backward()
    orders: list[bool] = []
    for layer in (ordered[0], ordered[2]):
        layer.register_forward_hook(
            lambda _, __, made: orders.append(made.is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(ordered(IMAGES.double()), plain(IMAGES.double()))
    assert orders == [True, True]
    for (name, one), other in zip(plain.named_parameters(), ordered.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=name)
