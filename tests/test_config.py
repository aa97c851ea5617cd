"""RandLoRAConfig: validated once, frozen, a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from randlora_vision import RandLoRAConfig

FULL = RandLoRAConfig(
    rank=8,
    alpha=3.5,
    dropout=0.1,
    target_modules=["qkv", "proj"],
    exclude_modules=["patch_embed"],
    layers_to_transform=[0, 3],
    rank_pattern={"proj": 4},
    alpha_pattern={"blocks.0.attn.qkv": 7},
    bases="sparse",
    seed=2**64 - 1,
    init="gamma-zero",
    modules_to_save=["head"],
)


def test_json_round_trip() -> None:
    assert RandLoRAConfig.from_json(FULL.to_json()) == FULL
    assert RandLoRAConfig.from_json(RandLoRAConfig().to_json()) == RandLoRAConfig()
    assert json.loads(FULL.to_json())["layers_to_transform"] == [0, 3]


def test_compute_is_no_part_of_the_adapter() -> None:
    pinned = RandLoRAConfig(compute="dense")
    assert pinned == RandLoRAConfig()
    assert pinned.to_json() == RandLoRAConfig().to_json() and "compute" not in pinned.to_json()


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.rank = 3  # type: ignore[misc]


def test_defaults_are_pefts() -> None:
    peft = pytest.importorskip("peft").RandLoraConfig()
    config = RandLoRAConfig()
    assert (config.rank, config.alpha_of(("x",))) == (peft.r, peft.randlora_alpha)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown key 'rnak'.*close matches: rank"):
        RandLoRAConfig.from_dict({"rnak": 3})
    with pytest.raises(ValueError, match="valid keys: rank, alpha"):
        RandLoRAConfig.from_dict({"zzz": 3})


@pytest.mark.parametrize("text", ["", "[1]", "3", "{", "null"])
def test_not_a_json_object(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RandLoRAConfig.from_json(text)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("rank", 2.0),
        ("rank", 3.5),
        ("rank", "8"),
        ("rank", np.float64(3)),
        ("rank", np.bool_(True)),
        ("rank", 10**30),
        ("alpha", float("inf")),
        ("alpha", 10**400),
        ("alpha", True),
        ("dropout", float("nan")),
        ("dropout", "0.1"),
        ("dropout", None),
        ("seed", 1.0),
        ("seed", True),
        ("seed", "1"),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", ["1"]),
        ("rank_pattern", {"a": 2.5}),
        ("rank_pattern", {3: 2}),
        ("alpha_pattern", {"a": float("nan")}),
        ("alpha_pattern", {"a": "1"}),
        ("target_modules", "a{99999999999999999999}"),
        ("target_modules", "(" * 9999),
        ("exclude_modules", True),
        ("modules_to_save", True),
        ("modules_to_save", {"head": 1}),
        ("bases", 3),
        ("init", None),
        ("compute", ["auto"]),
        ("rank", True),
        ("alpha", 0),
        ("alpha", float("nan")),
        ("alpha", "1"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("target_modules", []),
        ("target_modules", ["a", 3]),
        ("target_modules", "("),
        ("target_modules", 5),
        ("exclude_modules", [""]),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", []),
        ("rank_pattern", {"a": 0}),
        ("rank_pattern", ["a"]),
        ("alpha_pattern", {"a": -1.0}),
        ("bases", "gaussian"),
        ("seed", -1),
        ("seed", 2**64),
        ("init", "zero"),
        ("modules_to_save", "head"),
        ("compute", "fast"),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        RandLoRAConfig(**{field: value})


def test_numpys_numbers_are_plain_ones() -> None:
    config = RandLoRAConfig(
        rank=np.int64(8),
        alpha=np.float32(0.5),
        dropout=np.float64(0.25),
        seed=np.uint64(2**64 - 1),
        layers_to_transform=np.int32(2),
        rank_pattern={"a": np.int8(3)},
        alpha_pattern={"a": np.int16(3)},
    )
    assert RandLoRAConfig.from_json(config.to_json()) == config
    values = [config.rank, config.alpha, config.dropout, config.seed, config.rank_pattern["a"]]
    assert [type(value) for value in values] == [int, float, float, int, int]
    assert config.layers_to_transform == (2,) and type(config.alpha_pattern["a"]) is int


def test_close_choice_is_suggested() -> None:
    with pytest.raises(ValueError, match="close matches: very_sparse"):
        RandLoRAConfig(bases="very-sparse")


def test_overrides_follow_whole_components() -> None:
    config = RandLoRAConfig(rank=8, rank_pattern={"attn.proj": 4, "proj": 2}, alpha_pattern={"qkv": 5.0})
    assert config.rank_of(("blocks.0.attn.proj", "blocks.0.attn.proj.weight")) == 4
    assert config.rank_of(("patch_embed.proj",)) == 2
    assert config.rank_of(("out_proj",)) == 8
    assert config.alpha_of(("blocks.0.attn.qkv",)) == 5.0
    assert config.alpha_of(("patch_embed.proj",)) == 40.0  # 20 times its own rank
