"""Adapted layers against the dense matrix, for every kind of module and every way that hosts use one.

The truth is the paper's sum written out in float64 (`tests.helpers.dense_delta`) in a copy of the plain base, with
gradients by autograd through it.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, remove, unmerge
from randlora_vision.layers.adapted import AdaptedModule
from tests.helpers import clip, dense_model, dense_weights, mlp, randomize, vit

CONFIG = RandLoRAConfig(rank=3, target_modules="all")


class PackedAttention(nn.Module):
    """A host that holds a packed projection itself and reads it, with an optional q and v bias (BEiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8) / 3)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.randn(8))
        self.v_bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = (F.linear(x, self.in_proj_weight) + F.linear(x, weight=self.qkv.weight, bias=bias)).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """nn.MultiheadAttention as a function of one tensor."""

    def __init__(self, need_weights: bool, **options: object) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[..., : self.attention.kdim], x[..., : self.attention.vdim]
        out, weights = self.attention(x, key, value, need_weights=self.need_weights)
        return out if weights is None else torch.cat((out, weights), dim=-1)


class Reader(nn.Module):
    """A host that reads a raw matrix, as CLIP does its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


def weight_normed() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))


Make = Callable[[], nn.Module]
MODULES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "tall": (lambda: nn.Linear(8, 12), (5, 8)),
    "wide": (lambda: nn.Linear(8, 6, bias=False), (5, 8)),
    "square": (lambda: nn.Linear(8, 8), (2, 70, 8)),
    "1d": (lambda: nn.Linear(8, 6), (8,)),
    "4d": (lambda: nn.Linear(8, 12), (2, 3, 2, 8)),
    "empty": (lambda: nn.Linear(8, 6), (2, 0, 8)),
    "attention": (lambda: Attention(False), (2, 5, 8)),
    "attention-weights": (lambda: Attention(True), (2, 5, 8)),
    "attention-separate": (lambda: Attention(False, kdim=4, vdim=6), (2, 5, 8)),
    "attention-bias-kv": (lambda: Attention(True, kdim=4, vdim=6, add_bias_kv=True), (2, 5, 8)),
    "packed-host": (PackedAttention, (2, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 12, 3, padding=1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_equal_the_dense_matrix(name: str, training: bool) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    base = make().double().train(training)
    adapted = copy.deepcopy(base)
    report = inject(adapted, CONFIG)
    randomize(adapted)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    truth_x = x.detach().clone().requires_grad_()
    trained = {key: p.detach().clone().requires_grad_() for key, p in adapted.named_parameters() if "randlora" in key}

    weights = dense_weights(base, trained, report)
    truth = functional_call(base, weights, (truth_x,))
    out = adapted(x)
    target = torch.randn_like(truth)
    (out * target).sum().backward()
    (truth * target).sum().backward()

    assert len(weights) >= 1 and (not out.numel() or not torch.allclose(truth, base(x), atol=1e-3))
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(x.grad, truth_x.grad)
    for key, parameter in adapted.named_parameters():
        if key in trained:
            torch.testing.assert_close(parameter.grad, trained[key].grad, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad():  # no gradients: other kernels, among them attention's fast path
        torch.testing.assert_close(adapted(x), truth)


@pytest.mark.parametrize("targets", [["visual.proj"], ["text_projection"], ["in_proj_weight"], ["attn"]])
def test_raw_parameters_of_open_clip(targets: list[str]) -> None:
    base = clip()
    adapted = copy.deepcopy(base)
    report = inject(adapted, RandLoRAConfig(rank=3, target_modules=targets))
    randomize(adapted)
    image, text = torch.randn(2, 3, 16, 16), torch.randint(1, 32, (2, 8))
    truth = dense_model(base, adapted, report)
    for out, expected in zip(adapted(image, text), truth(image.double(), text), strict=True):
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted(image, text)[0], base(image, text)[0], atol=1e-3) or "text" in targets[0]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer_with_padding(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).train(training)
    adapted = copy.deepcopy(base)
    report = inject(adapted, RandLoRAConfig(rank=3))
    randomize(adapted)
    x, padding = torch.randn(3, 6, 8), torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    truth = dense_model(base, adapted, report).float()
    assert len(report.targets) == 8
    with torch.no_grad():
        out, expected = (model(x, src_key_padding_mask=padding)[~padding] for model in (adapted, truth))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_weight_norm_before_injection() -> None:
    base = weight_normed()
    plain = nn.Linear(8, 6)
    plain.load_state_dict({"weight": base.weight.detach(), "bias": base.bias.detach()})
    report = inject(base, RandLoRAConfig(rank=3))
    randomize(base)
    truth = dense_model(plain, base, report)
    x = torch.randn(5, 8)
    torch.testing.assert_close(base(x).double(), truth(x.double()), rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(base)
    assert torch.equal(copied(x), base(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("state", ["live", "merged"])
@pytest.mark.parametrize("late", ["parametrize", "weight_norm", "spectral_norm", "prune"])
def test_reparametrising_after_injection_fails(late: str, state: str) -> None:
    model = mlp()
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    if state == "merged":
        merge(model)
    keys, x = sorted(model.state_dict()), torch.randn(3, 8)
    before = model(x)
    calls: dict[str, Callable[[nn.Module], object]] = {
        "parametrize": torch.nn.utils.parametrizations.weight_norm,
        "weight_norm": torch.nn.utils.weight_norm,
        "spectral_norm": torch.nn.utils.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    }
    with pytest.raises(RuntimeError, match="before inject"):
        calls[late](model[0])
    assert torch.equal(model(x), before)
    assert sorted(model.state_dict()) == keys


def test_removing_a_parametrization_after_injection_fails_and_harms_nothing() -> None:
    model = nn.Sequential(weight_normed())
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="remove the adapters first"):
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(x), before)


def test_adapted_modules_keep_their_identity() -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.MultiheadAttention(6, 2), nn.Conv2d(4, 8, 3))
    adapted = copy.deepcopy(base)
    inject(adapted, CONFIG)
    for before, after in zip(base.modules(), adapted.modules(), strict=True):
        assert isinstance(after, type(before))
        names = ("__name__", "__qualname__", "__module__", "__doc__")
        assert [getattr(type(after), name) for name in names] == [getattr(type(before), name) for name in names]
        assert len(list(after.children())) == len(list(before.children()))
    assert [isinstance(module, AdaptedModule) for module in adapted] == [True, True, True]
    kept = {key: value for key, value in adapted.state_dict().items() if "_randlora_" not in key}
    assert list(kept) == list(base.state_dict())
    state = base.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in kept.items())
    remove(adapted)
    assert [type(module) for module in adapted.modules()] == [type(module) for module in base.modules()]
    assert [sorted(m.__dict__) for m in adapted.modules()] == [sorted(m.__dict__) for m in base.modules()]


def round_trip(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["vit", "attention", "tied"])
def test_copies_are_independent_and_share_the_bases(name: str, how: str) -> None:
    torch.manual_seed(0)
    x: Tensor
    if name == "vit":
        model, x = vit(), torch.randn(2, 3, 16, 16)
    elif name == "attention":
        model, x = Attention(False), torch.randn(2, 5, 8)
    else:
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
        model[1].weight = model[0].weight
    report = inject(model, RandLoRAConfig(rank=3))
    randomize(model)
    before = model(x)
    other = round_trip(model, how)
    assert torch.equal(other(x), before)
    pairs = list(zip(adapter_parameters(model), adapter_parameters(other), strict=True))
    assert len(pairs) == 2 * len(report.targets)
    assert all(mine is not theirs and theirs.requires_grad for (_, mine), (_, theirs) in pairs)
    with torch.no_grad():
        for _, parameter in adapter_parameters(other):
            parameter.mul_(2)
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)
    bases = {id(m._randlora[p].slots["default"].bases) for n in (model, other) for m, p in owners(n)}
    assert len(bases) == 1
    merge(other)
    torch.testing.assert_close(round_trip(other, how)(x), other(x))
    unmerge(other)
    remove(other)
    assert not any("_randlora_" in key for key in other.state_dict())


def owners(model: nn.Module) -> list[tuple[AdaptedModule, str]]:
    return [(m, p) for m in model.modules() if isinstance(m, AdaptedModule) for p in m._randlora]


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "meta", "to_empty"])
def test_moves_keep_float32_masters_and_parameter_identity(move: str) -> None:
    model = mlp()
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in adapter_parameters(model)}
    model(torch.randn(4, 8)).sum().backward()
    if move == "meta":
        model.to("meta")
    elif move == "to_empty":
        model.to("meta").to_empty(device="cpu")
    else:
        getattr(model, move)()
    dtype = torch.float64 if move == "double" else torch.float32
    for name, parameter in adapter_parameters(model):
        old, values = before[name]
        assert parameter.dtype == dtype and parameter.requires_grad
        assert parameter.grad is not None and parameter.grad.dtype == dtype
        if move in ("half", "bfloat16", "double"):
            assert parameter is old and torch.equal(parameter, values.to(dtype))
    if move in ("half", "bfloat16"):
        low = {"half": torch.float16, "bfloat16": torch.bfloat16}[move]
        assert model[0].base_weight().dtype == model(torch.randn(4, 8, dtype=low)).dtype == low


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_per_sample_gradients() -> None:
    for make, shape in (MODULES["wide"], MODULES["conv2d"], MODULES["attention"]):
        torch.manual_seed(0)
        module = make().double()
        inject(module, CONFIG)
        randomize(module)
        trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

        def loss(trained: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, trained, (x[None],)).square().sum()

        x = torch.randn((3, *shape[1:]), dtype=torch.float64)
        together = vmap(grad(loss), (None, 0))(trained, x)
        for i, sample in enumerate(x):
            module.zero_grad()
            module(sample[None]).square().sum().backward()
            for name, gradients in together.items():
                torch.testing.assert_close(gradients[i], module.get_parameter(name).grad)
