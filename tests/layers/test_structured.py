"""Structured bases in adapted models: they do everything that dense bases do, to the same tolerances."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from randlora_vision import RandLoRAConfig, inject, load_adapter, merge, remove, save_adapter, unmerge
from randlora_vision.layers.adapted import AdaptedModule
from tests.helpers import IMAGES, clip, dense_model, randomize, vit


def adapted(base: nn.Module, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """(adapted model, dense reference in float64)."""
    model = copy.deepcopy(base)
    report = inject(model, RandLoRAConfig(**{"rank": 4, "bases": "structured", **settings}))
    randomize(model)
    return model, dense_model(base, model, report)


class Odd(nn.Module):
    """Shapes that small factors do not divide: primes, a convolution, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 5, stride=5)
        self.up, self.down = nn.Linear(13, 47), nn.Linear(47, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.down(self.up(x).relu())
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("rank", [1, 3, 5, 12])
def test_any_shape_and_kind_of_layer(rank: int) -> None:
    torch.manual_seed(0)
    model, truth = adapted(Odd(), rank=rank, target_modules="all", alpha=2.0)
    x = torch.randn(2, 3, 17, 19)
    torch.testing.assert_close(model(x).double(), truth(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("sides", [(13, 47), (47, 13)])
def test_outputs_are_contiguous_and_their_own(sides: tuple[int, int], mode: Any) -> None:
    layer = nn.Linear(*sides)
    inject(layer, RandLoRAConfig(rank=5, bases="structured", target_modules=["weight"]))
    for tokens in (2, 500):
        with mode():
            out = layer(torch.randn(2, tokens, sides[0]))
            assert out.is_contiguous() and not out._is_view()
            out.add_(1).view(-1)


def test_ranks_of_one_model_have_bases_of_their_own() -> None:
    model, truth = adapted(vit(), rank_pattern={"qkv": 7, "fc1": 3})
    x = torch.randn(IMAGES)
    torch.testing.assert_close(model(x).double(), truth(x.double()), rtol=1e-4, atol=1e-4)


def test_clip_merges_saves_and_loads(tmp_path: Path) -> None:
    base = clip()
    model, truth = adapted(base)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        out = model.encode_image(x)  # type: ignore[operator]
        torch.testing.assert_close(out.double(), truth.encode_image(x.double()), rtol=1e-4, atol=1e-4)  # type: ignore
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(x), out)  # type: ignore[operator]
    merge(fresh)
    torch.testing.assert_close(fresh.encode_image(x), out, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    unmerge(fresh)
    remove(fresh)
    state = fresh.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    base = vit().to(dtype)
    model, truth = adapted(base)
    out = model(torch.randn(IMAGES, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()
    x = torch.randn(IMAGES, dtype=dtype)
    exact = truth(x.double())
    # Some 2 eps, layer after layer, as the machine's kernels round; each single map is judged in test_functional.py.
    assert (model(x).double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


def test_autocast_computes_in_low_precision() -> None:
    model, truth = adapted(vit())
    x = torch.randn(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().square().sum().backward()
    exact = truth(x.double())
    assert (out.double() - exact).norm() <= 8 * torch.finfo(torch.bfloat16).eps * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_twenty_steps_equal_those_of_the_dense_formula() -> None:
    """Training through the factors against autograd on the dense B, in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 29), nn.GELU(), nn.Linear(29, 9)).double()
    x, y = torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 9, dtype=torch.float64)
    losses = {}
    for compute in ("auto", "dense", "factored"):
        model = copy.deepcopy(base)
        inject(model, RandLoRAConfig(rank=3, bases="structured", compute=compute))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[compute] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses[compute].append(loss.item())
    assert losses["auto"][-1] < 0.9 * losses["auto"][0]
    for compute in ("dense", "factored"):
        assert losses[compute] == pytest.approx(losses["auto"], rel=1e-9)


@pytest.mark.slow
def test_a_vits_step_costs_little_more_than_loras() -> None:
    """ViT-B/16's layers: at most 0.52 of the FLOPs of PEFT's RandLora and 1.20 of LoRA's, at every number of images."""
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", depth=2, num_classes=0).requires_grad_(False)
    targets = ["qkv", "attn.proj", "fc1", "fc2"]
    ours, dense = copy.deepcopy(base), copy.deepcopy(base)
    inject(ours, RandLoRAConfig(rank=32, target_modules=targets, bases="structured"))
    inject(dense, RandLoRAConfig(rank=32, target_modules=targets))
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=6, target_modules=targets))
    with torch.device("meta"):
        settings = peft.RandLoraConfig(r=32, target_modules=targets)
        randlora = peft.get_peft_model(copy.deepcopy(base), settings).to("meta")

    def flops(model: nn.Module, images: int) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(images, 3, 224, 224, device="meta")).sum().backward()
        return counter.get_total_flops()

    assert isinstance(ours.blocks[0].attn.qkv, AdaptedModule)
    for images in (1, 4, 64):
        theirs = flops(randlora, images)
        assert flops(ours, images) <= min(0.52 * theirs, 1.20 * flops(lora, images))
        assert flops(dense, images) <= theirs


def test_backward_keeps_the_input_and_no_matrix() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 96)
    inject(layer, RandLoRAConfig(rank=20, bases="structured"))
    alive = {parameter.data_ptr() for parameter in layer.parameters()}
    x = torch.randn(500, 96, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    kept = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() not in alive}
    assert kept.pop(x.data_ptr()) == x.numel()
    # Shared signs of A's columns, and gamma with them: R times smaller than the weight.
    assert sorted(kept.values()) == [96, 5 * 96]
