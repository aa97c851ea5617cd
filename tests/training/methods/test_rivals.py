"""DoRA, VeRA and NoLA: PEFT's numbers where it has them, their sums where not, files, and budgets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.training.methods.adaptation import Adaptation
from randlora_vision.training.methods.rivals import RivalAdaptation, inject_rival, load_rival, rank_for_budget
from tests.helpers import clip, mlp

METHODS = ("dora", "vera", "nola")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def targets_of(model: nn.Module) -> list[str]:
    return [target.name for target in plan(model, RandLoRAConfig(rank=1)).targets]


@torch.no_grad()
def randomize(added) -> None:
    for part in added.values():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_it_is_pefts(method: str) -> None:
    from peft import LoraConfig, VeraConfig, get_peft_model

    base, x = mlp(), torch.randn(5, 8)
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    ours = copy.deepcopy(base)
    added = inject_rival(ours, method, targets, 3, 6.0, seed=1)
    randomize(added)
    shared = {"r": 3, "target_modules": targets}
    config = LoraConfig(lora_alpha=6, use_dora=True, **shared) if method == "dora" else VeraConfig(**shared)
    theirs = get_peft_model(base, config).base_model.model
    pairs = []
    with torch.no_grad():
        for target, part in added.items():
            layer = theirs.get_submodule(target)
            if method == "dora":
                own = (part.down, part.up, part.magnitude)
                other = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
                pairs += list(zip(own, [held["default"].weight for held in other], strict=True))
            else:
                for name, matrix in zip(("vera_B", "vera_A"), part.shared, strict=True):
                    getattr(layer, name)["default"].copy_(matrix)
                pairs += [(part.b, layer.vera_lambda_b["default"]), (part.d, layer.vera_lambda_d["default"])]
        for mine, other in pairs:
            other.copy_(mine)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_nola_is_its_sum() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    weight = model[0].weight.detach().clone()
    (part,) = inject_rival(model, "nola", ["0"], 5, 1.0, seed=0).values()
    randomize({"0": part})
    (bank,) = part.shared
    down = sum(part.a[k] * bank[k, :, :12] for k in range(5)) / 12**0.5
    up = sum(part.b[k] * bank[k, :, :20].T for k in range(5)) / 5**0.5
    torch.testing.assert_close(model[0].weight, weight + up @ down)


@pytest.mark.parametrize("method", METHODS)
def test_on_clip_it_starts_at_the_base_learns_everywhere_and_a_file_gives_it_back(method: str, tmp_path: Path) -> None:
    model, fresh, half = clip(), clip(), clip()
    with torch.no_grad():
        before = model.encode_image(IMAGES)
    adaptation: Adaptation = RivalAdaptation(model, method, targets_of(model), 2, 4.0, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(IMAGES), before, rtol=1e-4, atol=1e-5)
    texts = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0], [1, 6, 7, 31, 0, 0, 0, 0]])
    image, text, _ = model(IMAGES, texts)
    (image @ text.T).square().sum().backward()
    assert adaptation.check_gradients() == []
    assert all(part.first.grad.any() for part in adaptation.added.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in adaptation.parameters()}
    randomize(adaptation.added)
    adaptation.save(tmp_path / "a.safetensors")
    adaptation.load(fresh, tmp_path / "a.safetensors")
    load_rival(half, tmp_path / "a.safetensors", scale=0.5)
    with torch.no_grad():
        after = model.encode_image(IMAGES)
        assert torch.equal(fresh.encode_image(IMAGES), after) and not torch.allclose(after, before)
    name = "visual.transformer.resblocks.0.mlp.c_fc"
    weights = [m.get_submodule(name).weight for m in (clip(), half, model)]
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    again = RivalAdaptation(clip(), method, targets_of(model), 2, 4.0, seed=3)
    again.start_from(tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.parameters(), adaptation.parameters(), strict=True))
    other = RivalAdaptation(clip(), method, targets_of(model), 2, 4.0, seed=4)
    with pytest.raises(ValueError, match="not written with these settings"):
        other.start_from(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no weight"):
        load_rival(mlp(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", ["lora", *METHODS])
def test_the_rank_comes_nearest_to_the_budget(method: str) -> None:
    from randlora_vision.training.methods.lora import inject_lora

    model = clip()
    targets = targets_of(model)

    def numbers(rank: int) -> int:
        fresh = clip()
        added = (
            inject_lora(fresh, targets, rank, 1.0)
            if method == "lora"
            else inject_rival(fresh, method, targets, rank, 1.0, 0)
        )
        return sum(p.numel() for part in added.values() for p in part.parameters())

    low, high = numbers(2), numbers(3)
    assert rank_for_budget(method, model, targets, round(0.6 * low + 0.4 * high)) == 2
    assert rank_for_budget(method, model, targets, round(0.4 * low + 0.6 * high)) == 3
    assert rank_for_budget(method, model, targets, 1) == 1


def test_mistakes_leave_the_model_alone() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="DoRA rank 7 is above the smaller side of 2, 6"):
        inject_rival(model, "dora", ["0", "2"], 7, 1.0, 0)
    assert set(model.state_dict()) == set(mlp().state_dict())
