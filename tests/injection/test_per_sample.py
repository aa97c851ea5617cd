"""A batch of several adapters: the reference is every sample on its own, with its adapter as the only active one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.operations import Operations
from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    cached,
    delete_adapter,
    disabled,
    inject,
    merge,
    per_sample,
    remove,
    set_active,
    set_scale,
)
from tests.helpers import IMAGES, clip, mlp, randomize, snapshot, vit

NAMES = ["a", None, "b", "a", "c", "base"]
EXACT = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


def adapted(model: nn.Module, names: str = "abc", **settings: Any) -> nn.Module:
    for i, name in enumerate(names):
        own = {key: value[i] if isinstance(value, list) else value for key, value in settings.items()}
        inject(model, RandLoRAConfig(**{"rank": 4, "target_modules": "all-linear", **own}), name)
        randomize(model, name, seed=i)
    return model.eval()


def one_by_one(model: nn.Module, names: Sequence[str | None], run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    outputs = []
    for i, name in enumerate(names):
        set_active(model, [] if name in (None, "base") else [name])
        outputs.append(run(x[i : i + 1]))
    return torch.cat(outputs)


@torch.no_grad()
def check(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None, names: Any = NAMES) -> None:
    run = run or model
    expected = one_by_one(model, names, run, x)
    with per_sample(model, names):
        out = run(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=EXACT[x.dtype] * float(expected.abs().max()))
    assert not torch.allclose(out, run(x), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["uniform", "sparse", "structured"])
def test_every_sample_has_its_adapter(kind: str, dtype: torch.dtype) -> None:
    check(adapted(vit(), bases=kind).to(dtype), torch.randn(6, *IMAGES[1:], dtype=dtype))


@pytest.mark.parametrize("shape", [(6, 8), (6, 700, 8), (6, 2, 3, 8), (6, 1, 2, 2, 8)])  # many tokens build the weight
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    check(adapted(mlp().double()), torch.randn(shape, dtype=torch.float64))


def test_adapters_of_other_ranks_bases_targets_and_scales() -> None:
    settings = {"rank": [4, 3, 2], "bases": ["uniform", "structured", "sparse"], "seed": [0, 1, 2]}
    model = adapted(mlp().double(), target_modules=[["0"], ["0", "2"], ["2"]], **settings)
    set_scale(model, 0.3, "b")
    x = torch.randn(6, 8, dtype=torch.float64)
    check(model, x)
    set_scale(model, 0.0, "a")
    check(model, x)


def test_half_precision() -> None:
    check(adapted(vit()).bfloat16(), torch.randn(6, *IMAGES[1:]).bfloat16())
    model, x = adapted(mlp()), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, x.bfloat16())


def test_windows_are_rows_of_their_sample() -> None:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    settings: Any = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    model = SwinTransformer(**settings, depths=(2, 2), num_heads=(2, 2), num_classes=3).double()
    model = adapted(model)
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    check(model, x)
    with per_sample(model, ["a"] * 3), pytest.raises(ValueError, match="batch of 6 for 3 adapter names"):
        model(x)
    with per_sample(model, ["a"] * 3), pytest.raises(ValueError, match=r"'?layers\.0.* call the model"):
        model.layers(model.patch_embed(x))  # twice as many rows may be windows


def test_convolutions_run_once_per_adapter() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.GELU(), nn.ConvTranspose2d(8, 4, 2)
    model = adapted(nn.Sequential(*layers, nn.Conv2d(4, 4, 3, groups=2)).double(), target_modules="all", rank=2)
    check(model, torch.randn(6, 3, 8, 8, dtype=torch.float64))
    with per_sample(model, ["a"] * 3), pytest.raises(ValueError, match="first dimension must be the batch"):
        model(torch.randn(3, 8, 8, dtype=torch.float64))  # one image of three channels


def test_packed_attention_runs_once_per_adapter() -> None:
    model = adapted(clip()).double()
    check(model, torch.randn(6, *IMAGES[1:], dtype=torch.float64), model.encode_image)
    tokens = torch.randint(1, 32, (6, 8))
    with per_sample(model, NAMES):
        together = model.encode_text(tokens)
    torch.testing.assert_close(together, one_by_one(model, NAMES, model.encode_text, tokens), rtol=1e-9, atol=1e-9)


def test_masks_of_attention_belong_to_their_samples() -> None:
    torch.manual_seed(0)
    model = adapted(nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)}).double())
    x, padding = torch.randn(6, 5, 8, dtype=torch.float64), torch.rand(6, 5) < 0.3
    mask = torch.randn(12, 5, 5, dtype=torch.float64)
    expected = []
    for i, name in enumerate(NAMES):
        set_active(model, [] if name in (None, "base") else name)
        own = {
            "key_padding_mask": torch.zeros(1, 5).double().masked_fill(padding[i], -9.0),
            "attn_mask": mask[2 * i :][:2],
        }
        expected.append(model["mha"](x[i : i + 1], x[i : i + 1], x[i : i + 1], **own))
    whole = torch.zeros(6, 5).double().masked_fill(padding, -9.0)
    with per_sample(model, NAMES):
        out, weights = model["mha"](x, x, value=x, key_padding_mask=whole, attn_mask=mask)
    torch.testing.assert_close(out, torch.cat([pair[0] for pair in expected]))
    torch.testing.assert_close(weights, torch.cat([pair[1] for pair in expected]))


def test_modules_trained_in_full_run_once_per_adapter() -> None:
    model = adapted(vit().double(), modules_to_save=[["head", "norm"], [], ["head"]])
    with torch.no_grad():
        for i, name in enumerate("ac"):
            set_active(model, name)
            model.head.weight += i + 1
            model.norm.bias += i + 1
    set_active(model, "c")
    x = torch.randn(6, *IMAGES[1:], dtype=torch.float64)
    check(model, x)
    before = model.head.weight
    with per_sample(model, ["b"] * 6):  # the head of an active adapter that no sample has
        out = model(x)
    assert model.head.weight is before and "forward" not in model.head.__dict__
    torch.testing.assert_close(out, one_by_one(model, ["b"] * 6, model, x))
    model = adapted(vit(), modules_to_save=[["cls_token"]] * 3)
    with pytest.raises(ValueError, match="cls_token is trained in full .* VisionTransformer"), per_sample(model, ["a"]):
        pass


def test_tied_weights() -> None:
    model = mlp().double()
    model.append(nn.Linear(6, 16).double()).append(model[2])
    model[4].weight = model[2].weight
    check(adapted(model), torch.randn(6, 8, dtype=torch.float64))


def test_packed_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    check(adapted(base, rank=8), torch.randn(6, 3, 64))


@pytest.mark.parametrize("kind", ["uniform", "structured"])
def test_gradients_are_those_of_separate_samples(kind: str) -> None:
    model, x = adapted(vit(depth=1).double(), bases=kind), torch.randn(6, *IMAGES[1:], dtype=torch.float64)

    def gradients(out: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        out.square().sum().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}

    expected: dict[str, Tensor] = {}
    for i, name in enumerate(NAMES):
        if name in ("a", "b", "c"):
            set_active(model, name)
            for key, gradient in gradients(model(x[i : i + 1])).items():
                expected[key] = expected[key] + gradient if key in expected else gradient
    set_active(model, ["a", "b", "c"])
    with per_sample(model, NAMES):
        found = gradients(model(x))
        assert gradients(model(x)).keys() == found.keys()  # the graph of one step is not needed for the next
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_changes_within_the_block_are_noticed() -> None:
    model, x = adapted(mlp().double()), torch.randn(2, 8, dtype=torch.float64)
    with per_sample(model, ["a", "b"]):
        before = model(x)
        randomize(model, "a", seed=9)
        changed = model(x)
        set_scale(model, 0.5, "b")
        scaled = model(x)
        with cached():
            torch.testing.assert_close(model(x), scaled)
        with disabled(model):
            base = model(x)
    assert not torch.allclose(before[0], changed[0]) and torch.equal(before[1], changed[1])
    assert torch.equal(scaled[0], changed[0]) and not torch.allclose(scaled[1], changed[1])
    torch.testing.assert_close(scaled, one_by_one(model, ["a", "b"], model, x))
    torch.testing.assert_close(base, one_by_one(model, [None, None], model, x))


@torch.no_grad()
def test_blocks_within_blocks_and_errors_leave_the_model_as_it_was() -> None:
    model, x = adapted(vit().double(), modules_to_save=[["head"]] * 3), torch.randn(2, *IMAGES[1:], dtype=torch.float64)
    ab, ba = (one_by_one(model, names, model, x) for names in (["a", "b"], ["b", "a"]))
    before, active = snapshot(model), model(x)
    with pytest.raises(RuntimeError, match="of the test"), per_sample(model, ["a", "b"]):
        with per_sample(model, ["b", "a"]):
            torch.testing.assert_close(model(x), ba)
        torch.testing.assert_close(model(x), ab)
        raise RuntimeError("of the test")
    assert snapshot(model) == before and torch.equal(model(x), active)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "one adapter name"),
        ("a", "one adapter name"),
        ([1, 2], "one adapter name"),
        (["a", "nobody"], "no adapter 'nobody'; this model has: a, b, c"),
    ],
)
def test_wrong_names(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), per_sample(adapted(mlp()), names):
        pass


class Reading(nn.Module):
    """Reads the weight of its layer, as BEiT and EVA do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Flattening(Reading):
    """Hands the tokens of all samples to its layer, as mixtures of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x.flatten(0, 1))


class Turning(Reading):
    """Has the batch in the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("base", "shape", "message"),
    [
        (Reading, (2, 4, 8), "'qkv': its weight is read by other code .*set_active"),
        (Flattening, (2, 4, 8), r"'qkv' got an input of shape \(8, 8\) for 2 adapter names, which does not tell"),
        (Turning, (2, 4, 8), r"'qkv' got an input of shape \(4, 2, 8\) for 2 adapter names, which does not tell"),
        (Turning, (2, 5, 8), "its first dimension must be the batch"),
        (mlp, (3, 8), "the model got a batch of 3 for 2 adapter names"),
    ],
)
def test_what_cannot_be_known_is_refused(base: Callable[[], nn.Module], shape: Any, message: str) -> None:
    model = adapted(base())
    with per_sample(model, ["a", "b"]), pytest.raises((ValueError, RuntimeError), match=message):
        model(torch.randn(shape))


def test_states_of_the_model_that_are_refused() -> None:
    model, x = adapted(mlp(), dropout=[0.0, 0.5, 0.0]), torch.randn(2, 8)
    with per_sample(model, ["a", "b"]):
        model.train()
        with pytest.raises(ValueError, match="'0' has adapters with dropout: call model.eval"):
            model(x)
        for change in (merge, remove, lambda model: delete_adapter(model, "c")):
            with pytest.raises(ValueError, match="within per_sample: leave the block first"):
                change(model)
    with per_sample(model, ["a", "c"]):
        model(x)  # no sample has the adapter with dropout
    merge(model, "c")
    with pytest.raises(ValueError, match="c merged into the weights.* unmerge"), per_sample(model, ["a", "b"]):
        pass
    model = adapted(nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}))
    with pytest.raises(ValueError, match="'mha' has batch_first=False"), per_sample(model, ["a"]):
        pass


@torch.no_grad()
def test_operations_do_not_grow_with_the_number_of_adapters() -> None:
    model, x = adapted(vit(depth=1), "abcdef"), torch.randn(6, *IMAGES[1:])
    counts = []
    for names in (["a"] * 6, list("abcdef")):
        with per_sample(model, names), Operations() as operations:
            model(x)
        counts.append(operations.counts.total())
    assert counts[0] == counts[1]
