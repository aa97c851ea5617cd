"""Adapted layers where training stresses them: low precision, checkpointing, memory kept for backward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from randlora_vision import RandLoRAConfig, adapter_parameters, inject
from randlora_vision.bases import generate
from tests.helpers import dense_delta, randomize

SCALE = 20.0


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}
    model.zero_grad()
    return found


# Precision: compared with the error of a plain factored computation in the same precision.


def plain(kind: str, layer: nn.Module, x: Tensor, trained: list[Tensor], dtype: torch.dtype) -> Tensor:
    """RandLoRA the obvious way, all products in `dtype`: factored as PEFT does it, or a convolution's new weight."""
    lam, gamma = trained
    rank, bases = lam.shape
    weight = layer.weight.reshape(layer.weight.shape[0], -1)
    narrow, wide = sorted(weight.shape)
    a = torch.from_numpy(generate(kind, 0, 0, rank, narrow, narrow))
    b = torch.from_numpy(generate(kind, 0, 1, wide, rank * bases, narrow)).to(dtype)
    af = (lam[:, :, None] * a[:, None] * gamma[None]).reshape(-1, narrow).to(dtype)
    first, second = (af, b) if weight.shape[0] == wide else (b.t(), af.t())
    if x.ndim == 4:
        updated = weight.to(dtype) + SCALE * (second @ first)
        return F.conv2d(x.to(dtype), updated[:, :, None, None], layer.bias.to(dtype))
    branch = F.linear(F.linear(x.to(dtype), first), second)
    return F.linear(x.to(dtype), weight.to(dtype), layer.bias.to(dtype)) + SCALE * branch


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", ["autocast", "pure"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)])
@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("bases", ["uniform", "structured"])
def test_low_precision_is_as_good_as_the_plain_computation(
    shape: tuple[int, int], tokens: int, base_dtype: str, dtype: torch.dtype, read: bool, bases: str
) -> None:
    torch.manual_seed(0)
    # A 1 x 1 convolution stands for the layers whose weight is read.
    layer: Any = nn.Conv2d(shape[1], shape[0], 1) if read else nn.Linear(shape[1], shape[0])
    x, target = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    autocast = torch.autocast("cpu", dtype, enabled=base_dtype == "autocast")
    if base_dtype == "pure":
        layer, x, target = layer.to(dtype), x.to(dtype), target.to(dtype)
    weight, bias = layer.weight.detach().reshape(shape), layer.bias.detach()
    inject(layer, RandLoRAConfig(rank=8, target_modules="all", bases=bases))
    randomize(layer)
    trained = [p for _, p in adapter_parameters(layer)]
    frozen = copy.deepcopy(layer)

    def image(x: Tensor) -> Tensor:
        return x[:, :, None, None] if read else x

    def run(kind: str) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *trained)]
        if kind == "truth":
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
            delta = dense_delta(leaves[1], leaves[2], shape, SCALE, bases, 0, min(shape))
            out = F.linear(leaves[0], weight.double() + delta, bias.double())
        elif kind == "plain":
            base = frozen.base_weight()
            out = plain(bases, _Frozen(base, bias), image(leaves[0]), leaves[1:], dtype)
        else:
            names = [name for name, _ in layer.named_parameters() if "randlora" in name]
            with autocast:
                call = torch.func.functional_call
                out = call(layer, dict(zip(names, leaves[1:], strict=True)), (image(leaves[0]),))
        out = out.reshape(tokens, -1)
        (out.to(target.dtype if kind != "truth" else torch.float64) * target).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth, ours, theirs = run("truth"), run("ours"), run("plain")
    assert ours[0].dtype == dtype and ours[2].dtype == ours[3].dtype == torch.float32
    for what, exact, mine, other in zip(("output", "x", "lambda", "gamma"), truth, ours, theirs, strict=True):
        assert error(mine, exact) <= 2 * error(other, exact), what


class _Frozen(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), bias


@pytest.mark.parametrize("bases", ["uniform", "structured"])
def test_gamma_at_its_start_does_not_underflow_in_float16(bases: str) -> None:
    layer = nn.Linear(1024, 1024, bias=False)
    inject(layer, RandLoRAConfig(rank=512, bases=bases))
    lam, gamma = (p for _, p in adapter_parameters(layer))
    with torch.no_grad():
        lam.fill_(1e-4)
    x = torch.randn(4, 1024)
    exact = dense_delta(lam.detach(), gamma.detach(), (1024, 1024), SCALE, bases, 0, 1024)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        moved = layer.half()(x.half()).double() - F.linear(x.half(), layer.base_weight()).double()
    expected = x.half().double() @ exact.T
    # Adding to the base's output in float16 rounds at its scale, which dwarfs this small update.
    assert error(moved, expected) < 0.1


def test_float32_input_to_a_bfloat16_layer_is_refused_as_by_the_base() -> None:
    base = nn.Linear(8, 6).bfloat16()
    adapted = copy.deepcopy(base)
    inject(adapted, RandLoRAConfig(rank=2))
    randomize(adapted)
    messages = []
    for layer in (base, adapted):
        with pytest.raises(RuntimeError) as caught:
            layer(torch.randn(3, 8))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_region_without_autocast_inside_a_host_reads_full_precision() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(24, 8))

        def forward(self, x: Tensor) -> Tensor:
            low = F.linear(x, self.in_proj_weight)
            with torch.autocast("cpu", enabled=False):
                return low.float() + F.linear(x, self.in_proj_weight)

    host = Host()
    inject(host, RandLoRAConfig(rank=2))
    randomize(host)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = host(x)
    torch.testing.assert_close(out, 2 * F.linear(x, host.in_proj_weight), rtol=0.05, atol=0.1)


# Checkpointing gives the numbers of the plain step.


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(attention, nn.Unflatten(1, (5, 1)), nn.Flatten(2), nn.Conv1d(5, 5, 3), nn.Linear(6, 6))
    inject(model, RandLoRAConfig(rank=2, target_modules="all"))
    randomize(model)
    x = torch.randn(2, 5, 8, requires_grad=True)
    model(x).square().sum().backward()
    expected = gradients(model)
    x.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 12
    for name, gradient in found.items():
        # Without gradients the first pass takes other kernels, which moves the loss's gradient.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


# Memory: what stays allocated after the forward pass beyond what full fine-tuning keeps.


class Allocations(TorchDispatchMode):
    """Every storage that an operation creates, by weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in views:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass, its output included."""
    model(x).sum().backward()  # creates the bases and allocates the gradients
    with Allocations() as allocations:
        out = model(x)
    kept = allocations.alive()
    out.sum().backward()
    return kept


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


WIDTH = 96
CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (500, WIDTH)),
    "attention": (lambda: SelfAttention(WIDTH), (1, 500, WIDTH)),
    "convolution": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), (1, WIDTH, 20, 25)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("bases", ["uniform", "structured"])
def test_backward_keeps_what_full_fine_tuning_keeps_and_no_matrix(bases: str, kind: str, autocast: bool) -> None:
    make, shape = CHAINS[kind]
    full = nn.Sequential(*(make() for _ in range(3))).requires_grad_(False)
    adapted = copy.deepcopy(full)
    # 100 columns of B: T x K differs from T x WIDTH.
    inject(adapted, RandLoRAConfig(rank=20, target_modules="all", bases=bases))
    randomize(adapted)
    for parameter in full.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # Full fine-tuning's low-precision copies of its weights sit in autocast's cache, made before this counts.
        more = kept_bytes(adapted, x) - kept_bytes(full, x)
    if bases == "structured":  # gamma with the signs of A's columns
        more -= sum(p.nbytes for name, p in adapter_parameters(adapted) if name.endswith(".gamma"))
    assert more < WIDTH * WIDTH


@pytest.mark.parametrize("compute", ["auto", "memory"])
@pytest.mark.parametrize("bases", ["uniform", "structured"])
def test_memory_savers_together_change_no_gradient(bases: str, compute: str) -> None:
    """Recomputed activations, saved tensors moved to the CPU, and the fewest kept bytes."""

    def trained(compute: str, saver: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).double()
        inject(model, RandLoRAConfig(rank=2, bases=bases, compute=compute))
        randomize(model)
        x = torch.randn(150, 8, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.save_on_cpu() if "offload" in saver else contextlib.nullcontext():
            out = checkpoint(model, x, use_reentrant=False) if "recompute" in saver else model(x)
        out.square().sum().backward()
        return {"x": x.grad, **{name: p.grad for name, p in adapter_parameters(model)}}

    expected = trained("dense", "")
    for saver in ("", "recompute", "offload", "recompute and offload"):
        for name, gradient in trained(compute, saver).items():
            torch.testing.assert_close(gradient, expected[name])
