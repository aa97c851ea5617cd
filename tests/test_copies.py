"""Copies of models equal those of copy.deepcopy."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.copies import template


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.first.weight = self.second.weight
        self.register_buffer("scale", torch.ones(2))
        self.also = {"first": self.first}


def test_a_copy_has_its_own_tensors_and_modules_shared_as_in_the_original() -> None:
    original = Tied()
    make, other = template(original), copy.deepcopy(original)
    one, two = make(), make()
    for made in (one, two):
        assert made.first.weight is made.second.weight and made.also["first"] is made.first
        assert not made.first.weight.requires_grad and made.first.bias.requires_grad
        for (name, tensor), (expected, value) in zip(
            made.state_dict().items(), other.state_dict().items(), strict=True
        ):
            assert name == expected and torch.equal(tensor, value)
    with torch.no_grad():
        one.scale.zero_()
        one.first.weight.zero_()
    assert two.scale.all() and torch.equal(two.first.weight, original.first.weight) and original.scale.all()


def test_what_cannot_be_pickled_is_copied_all_the_same() -> None:
    original = nn.Linear(2, 2)
    original.act = lambda x: x  # type: ignore[assignment]
    made = template(original)()
    assert made.weight is not original.weight and torch.equal(made.weight, original.weight)
