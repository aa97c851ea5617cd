"""Whoever needs the bases first, under whatever mode of PyTorch, leaves them as everyone else would."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from randlora_vision import RandLoRAConfig, adapter_parameters, inject
from randlora_vision.bases import Bases, generate, get_bases
from randlora_vision.bases.base import A, B, BasesSpec
from randlora_vision.bases.stored import stored_bases
from randlora_vision.compute.cache import cached
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import mlp, randomize

OTHERS = ("structured", "sparse", "peft", "structured")
SEEDS = itertools.count(5000)
"""Bases that no other test has drawn."""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def under(context: Any) -> Callable[[nn.Module, Tensor], object]:
    def first(model: nn.Module, x: Tensor) -> object:
        with context():
            return model(x)

    return first


def fake(model: nn.Module, x: Tensor) -> Tensor:
    mode = FakeTensorMode()
    parameters = {name: mode.from_tensor(tensor) for name, tensor in tensors(model).items()}
    with mode:
        return functional_call(model, parameters, (mode.from_tensor(x),))


def fake_with_real_weights(model: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


def traced(mode: str) -> Callable[[nn.Module, Tensor], object]:
    def first(model: nn.Module, x: Tensor) -> object:
        return make_fx(lambda p, x: functional_call(model, p, (x,)), tracing_mode=mode)(tensors(model), x)

    return first


def per_sample(model: nn.Module, x: Tensor) -> object:
    loss = torch.func.grad(lambda p, row: functional_call(model, p, (row[None],)).sum())
    return torch.vmap(loss, (None, 0))(tensors(model), x)


def functionalized(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad():
        return torch.func.functionalize(model)(x)


def jvp(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad():
        return torch.func.jvp(model, (x,), (x,))


def cached_pass(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad(), cached():
        return model(x)


def jit(model: nn.Module, x: Tensor) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, (x,))


def saved_under_fake(model: nn.Module, x: Tensor) -> str:
    with FakeTensorMode():
        return bases_of(model).sha256


FIRST: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "inference_mode": under(torch.inference_mode),
    "no_grad": under(torch.no_grad),
    "meta device": under(lambda: torch.device("meta")),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "flop counter": under(lambda: FlopCounterMode(display=False)),
    "cached": cached_pass,
    "fake": fake,
    "fake, real weights": fake_with_real_weights,
    "checksum under fake": saved_under_fake,
    "make_fx": traced("real"),
    "make_fx fake": traced("fake"),
    "make_fx symbolic": traced("symbolic"),
    "export": lambda model, x: torch.export.export(model, (x,)),
    "jit": jit,
    "vmap of grad": per_sample,
    "functionalize": functionalized,
    "jvp": jvp,
    "vmap": lambda model, x: torch.vmap(model)(x),
}


def bases_of(model: nn.Module) -> Bases:
    return next(adapted_modules(model))[3].slots["default"].bases


def adapted(kind: str, seed: int) -> nn.Module:
    model = mlp()
    inject(model, RandLoRAConfig(rank=2, bases=kind, seed=seed))
    randomize(model)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# Each mode with the dense bases, which most people use, and with one of the other kinds in turn.
@pytest.mark.parametrize(
    ("first", "kind"),
    [(first, kind) for number, first in enumerate(FIRST) for kind in ("uniform", OTHERS[number % len(OTHERS)])],
)
def test_the_first_pass_leaves_plain_bases(first: str, kind: str) -> None:
    seed, x = next(SEEDS), torch.randn(5, 8)
    model = adapted(kind, seed)
    FIRST[first](model, x)
    bases = bases_of(model)
    spec, held = bases.spec, dict(bases._tensors)
    for (key, device, dtype), kept in held.items():
        if device.type == "meta":
            assert all(tensor.is_meta for tensor in kept)
            continue
        again = type(bases)(spec).kept(key, device, dtype)
        for tensor, other in zip(kept, again, strict=True):
            assert type(tensor) is nn.Parameter and not tensor.is_inference() and not tensor.requires_grad
            assert tensor.device == device and tensor.dtype == dtype and torch.equal(tensor, other)
    assert bases.sha256 == type(bases)(spec).sha256
    sharer = adapted(kind, seed)  # another model with the same bases
    assert bases_of(sharer) is bases
    sharer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapter_parameters(sharer))


def test_a_model_of_fake_tensors() -> None:
    """Memory and shapes of a model that does not exist; its bases are fake too, and nobody else's."""
    with FakeTensorMode():
        model = adapted("uniform", seed := next(SEEDS))
        model(torch.randn(5, 8)).sum().backward()
        assert all(p.grad is not None for _, p in adapter_parameters(model))
        on_device = nn.Linear(8, 8, device="cuda")
        inject(on_device, RandLoRAConfig(rank=2, seed=seed))
        assert on_device(torch.randn(5, 8, device="cuda")).device.type == "cuda"
    x = torch.randn(5, 8)
    assert torch.equal(adapted("uniform", seed)(x), adapted("uniform", seed)(x))
    assert {device.type for _, device, _ in bases_of(model)._tensors} <= {"meta", "cpu"}


def test_a_traced_graph_with_fake_bases_does_not_run_silently() -> None:
    model, x = adapted("uniform", next(SEEDS)), torch.randn(5, 8)
    graph = traced("fake")(model, x)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        graph(tensors(model), x)  # type: ignore[operator]


def test_stored_bases_read_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        bases = stored_bases(torch.randn(2, 8), torch.randn(16, 8))
    lam, gamma = torch.randn(2, 4, requires_grad=True), torch.randn(4, 8)
    term = bases.term(lam, gamma, 16, 1.0, torch.float32)
    term.times_b_t(None, term.times_af_t(torch.randn(3, 8, requires_grad=True))[0]).sum().backward()
    assert lam.grad is not None and not any(tensor.is_inference() for tensor in bases.given)


def test_a_capture_of_a_cuda_graph_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = get_bases(BasesSpec("uniform", next(SEEDS), 2, 8, 16, 8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before the capture"):
        bases.kept(A, torch.device("cuda"), torch.float32)
    assert not bases._tensors


def test_a_window_shares_the_memory_of_the_matrix() -> None:
    bases = get_bases(BasesSpec("uniform", next(SEEDS), 2, 8, 16, 8))
    cpu = torch.device("cpu")
    (window,), (whole,) = bases.kept((B, 6, 4), cpu, torch.float32), bases.kept(B, cpu, torch.float32)
    assert window.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    numbers = generate("uniform", bases.spec.seed, B, 6, 4, 8)
    assert torch.equal(window, torch.from_numpy(numbers))
