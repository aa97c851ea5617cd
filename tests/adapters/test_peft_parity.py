"""PEFT's RandLora as an independent reference: equal bases, lambda and gamma give equal results."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import peft
import pytest
import timm
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject
from randlora_vision.bases import Bases
from randlora_vision.bases.dense import DenseBases
from randlora_vision.layers.adapted import AdaptedModule, adapted_modules

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class GivenBases(DenseBases):
    """Bases with the values of a PEFT model."""

    def __init__(self, like: Bases, a: Tensor, b: Tensor) -> None:
        super().__init__(like.spec)
        self._given = (a, b)

    def _source(self, matrix: int) -> Tensor:
        return self._given[matrix]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 7))


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "mlp": (mlp, (6, 12), ["0", "2", "4"]),
    "vit": (vit, (3, 3, 32, 32), ["qkv", "attn.proj", "fc1", "fc2"]),
}


def pair(case: str, kind: str, rank: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """(PEFT's model, ours, input): the same base, bases, lambda and gamma, lambda away from zero."""
    build, shape, targets = CASES[case]
    torch.manual_seed(0)
    base = build().eval()
    flags = {"sparse": kind == "sparse", "very_sparse": kind == "very_sparse"}
    settings = peft.RandLoraConfig(r=rank, randlora_alpha=3 * rank, target_modules=targets, **flags)
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    ours = copy.deepcopy(base)
    inject(ours, RandLoRAConfig(rank=rank, alpha=3 * rank, target_modules=targets, bases=kind))
    a, b = theirs.base_model.randlora_A["default"], theirs.base_model.randlora_B["default"]
    for path, module, param, state in adapted_modules(ours):
        slot = state.slots["default"]
        slot.bases = GivenBases(slot.bases, a[:, 0], b.flatten(1))
        layer = theirs.base_model.model.get_submodule(path)
        lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        mine = module.adapter_tensors(param, "default")
        assert torch.equal(mine[1], gamma)  # the start is PEFT's own
        assert not lam.any() and not mine[0].any()
        with torch.no_grad():
            lam.normal_(0, 0.05)
            gamma.mul_(torch.rand_like(gamma) + 0.5)
            for tensor, value in zip(mine, (lam, gamma), strict=True):
                tensor.copy_(value)
    return theirs, ours, torch.randn(shape)


def gradients(theirs: nn.Module, ours: nn.Module) -> list[tuple[Tensor, Tensor]]:
    found = []
    for path, module, param, _ in adapted_modules(ours):
        layer = theirs.base_model.model.get_submodule(path)
        peers = (layer.randlora_lambda["default"], layer.randlora_gamma["default"])
        for tensor, peer in zip(module.adapter_tensors(param, "default"), peers, strict=True):
            assert tensor.grad is not None and peer.grad is not None
            found.append((tensor.grad, peer.grad))
    return found


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("kind", ["uniform", "sparse", "very_sparse"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, kind: str, rank: int) -> None:
    theirs, ours, x = pair(case, kind, rank)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, **TOLERANCE)
    for out in outputs:
        out.square().sum().backward()
    for mine, peer in gradients(theirs, ours):
        # relative to the tensor's own size: single numbers cancel
        assert (mine - peer).norm() <= 1e-5 * peer.norm()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("case", CASES)
def test_twenty_optimiser_steps(case: str, optimizer: type[torch.optim.Optimizer]) -> None:
    theirs, ours, x = pair(case, "uniform", 4)
    rate = 3e-2 if optimizer is torch.optim.SGD else 3e-3
    runs = []
    for model in (ours, theirs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step = optimizer(trained, lr=rate)  # type: ignore[call-arg]
        losses = []
        for _ in range(20):
            loss = (model(x) - 1).square().mean()
            loss.backward()
            step.step()
            step.zero_grad()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    assert runs[0][-1] < 0.95 * runs[0][0]
    torch.testing.assert_close(*runs, **TOLERANCE)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


def test_same_trained_numbers() -> None:
    theirs, ours, _ = pair("vit", "uniform", 5)
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for _, tensor in adapter_parameters(ours)) == count


def test_bases_have_no_more_than_the_needed_size() -> None:
    """PEFT sizes by the largest input and output; for a ViT's MLP its B is four times ours in columns."""
    theirs, ours, _ = pair("vit", "uniform", 4)
    state = next(itertools.islice(adapted_modules(ours), 1))[3]
    spec = state.slots["default"].bases.spec
    assert (spec.narrow, spec.wide, spec.columns) == (48, 192, 48)
    assert theirs.base_model.randlora_B["default"].flatten(1).shape == (192, 192)
    assert all(isinstance(module, AdaptedModule) for _, module, _, _ in adapted_modules(ours))
