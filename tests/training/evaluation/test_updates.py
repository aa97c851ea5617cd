"""Effective weights of every kind of adapter, spectra, CKA, and the plane through three models."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject
from randlora_vision.training.evaluation.updates import (
    block_features,
    blocks_with,
    cka,
    effective_rank,
    effective_weights,
    landscape,
    plane_through,
    updates,
    weights_of,
)
from randlora_vision.training.methods.lora import inject_lora
from tests.helpers import clip, mlp


def test_effective_weights_of_adapters_are_those_that_the_model_computes_with() -> None:
    base, x = mlp(), torch.randn(3, 8)
    names = [name for name, _ in base.named_parameters()]
    for adapt in (
        lambda model: inject(model, RandLoRAConfig(rank=2, target_modules=["0", "2"])),
        lambda model: inject_lora(model, ["0", "2"], 2, 4.0),
    ):
        model = copy.deepcopy(base)
        adapt(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        weights = effective_weights(model, names)
        plain = copy.deepcopy(base)
        plain.load_state_dict(weights)
        torch.testing.assert_close(plain(x), model(x))
        changed = updates(dict(base.named_parameters()), weights)
        assert set(changed) == {"0.weight", "2.weight"}
        with weights_of(base, weights):
            torch.testing.assert_close(base(x), model(x))
        assert not torch.allclose(base(x), model(x))


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_rank(torch.zeros(3)) == 0


def test_cka_by_its_kernels() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 5)), generator.normal(size=(20, 8))
    centre = np.eye(20) - 1 / 20
    k, h = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * h).sum() / np.sqrt((k * k).sum() * (h * h).sum())
    assert cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    turned = x @ np.linalg.qr(generator.normal(size=(5, 5)))[0] * 3 + 1
    assert cka(torch.from_numpy(x), torch.from_numpy(turned)) == pytest.approx(1)


def test_the_plane_meets_its_three_models_and_its_grid_is_the_loss() -> None:
    models = [mlp() for _ in range(3)]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    weights = [effective_weights(model, dict(model.named_parameters())) for model in models]
    plane = plane_through(*weights)
    for own, point in zip(weights, plane.points, strict=True):
        torch.testing.assert_close(plane.at(*point), own, rtol=1e-4, atol=1e-4)
    x = torch.randn(4, 8)
    base = mlp()
    before = base(x)
    u, v, grid = landscape(plane, base, lambda model: float(model(x).square().mean()), 3)
    assert torch.equal(base(x), before)
    with weights_of(base, plane.at(u[2], v[1])):
        assert grid[1][2] == pytest.approx(float(base(x).square().mean()))
    with pytest.raises(ValueError, match="lie on a line"):
        plane_through(weights[0], weights[1], weights[1])


def test_blocks_of_both_towers_and_their_features() -> None:
    model = clip().eval()
    changed = [name for name, _ in model.named_parameters() if ".mlp." in name]
    blocks = blocks_with(model, changed)
    assert blocks and all(name.rpartition(".")[2].isdigit() for name in blocks)
    assert {name.startswith("visual.") for name in blocks} == {True, False}
    images = torch.randn(2, 3, 16, 16)
    features = block_features(model, blocks, lambda model: model.encode_image(images))
    assert features and all(name.startswith("visual.") and len(held) == 2 for name, held in features.items())
