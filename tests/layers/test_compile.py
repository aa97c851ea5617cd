"""torch.compile: adapted models are one graph, in training and in inference, before and after their first pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    disabled,
    inject,
    per_sample,
    set_active,
    set_scale,
)
from randlora_vision.bases.stored import stored_bases
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import mlp, randomize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
SEEDS = iter(range(1000, 2000))
"""Bases that no other test has drawn."""


class Counting:
    """Compiles with a backend in one graph and counts the compilations."""

    def __init__(self, backend: str = "eager") -> None:
        self.compilations = 0
        self.backend = backend

    def __call__(self, model: Any, **options: Any) -> Any:
        compiler = torch._dynamo.lookup_backend(self.backend)

        def backend(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            return compiler(graph, inputs)

        return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cold(model: nn.Module, name: str = "default", **settings: Any) -> nn.Module:
    """The model with an adapter whose bases do not exist yet."""
    inject(model, RandLoRAConfig(**{"rank": 2, "seed": next(SEEDS), **settings}), name)
    randomize(model)
    return model


def one_layer() -> nn.Module:
    """For what does not depend on the layers: compiling takes its time by the layer."""
    return nn.Sequential(nn.Linear(8, 16), nn.GELU())


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients; draws of dropout are the same at every call."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        out = run(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}


def assert_trains_alike(model: nn.Module, compiled: Any, x: Tensor) -> None:
    out, gradients = step(model, compiled, x)  # first: nothing has been drawn
    expected, truth = step(model, model, x)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert truth and gradients.keys() >= truth.keys()
    for name, gradient in gradients.items():
        expected = truth.get(name, torch.zeros_like(gradient))  # at scale 0 there is none, or zero
        rounding = 1e-5 * float(expected.abs().max())  # sums round by their largest term
        torch.testing.assert_close(gradient, expected, **{**TOLERANCE, "atol": max(TOLERANCE["atol"], rounding)})


@pytest.mark.parametrize("kind", ["uniform", "sparse", "structured", "peft"])
def test_training_from_cold(kind: str) -> None:
    base = mlp() if kind == "uniform" else one_layer()  # several layers share their bases alike for every kind
    compiler, model = Counting("aot_eager"), cold(base, bases=kind)
    assert_trains_alike(model, compiler(model), torch.randn(5, 8))
    assert compiler.compilations == 1


@pytest.mark.slow
def test_dropout_and_two_adapters_in_training() -> None:
    compiler, model = Counting(), cold(mlp().train(), rank=4, dropout=0.3)
    cold(model, "other", bases="structured", alpha=3.0)
    assert_trains_alike(model, compiler(model), torch.randn(5, 8))
    assert compiler.compilations == 1


# The kinds of bases compile alike in training, so here each mode is tried with one or the other.
@pytest.mark.parametrize(
    ("mode", "kind"),
    [(torch.no_grad, "structured"), (torch.inference_mode, "uniform"), (torch.enable_grad, "structured")],
)
def test_inference_from_cold(mode: Any, kind: str) -> None:
    compiler, model, x = Counting(), cold(mlp(), bases=kind).requires_grad_(False), torch.randn(5, 8)
    with mode():
        torch.testing.assert_close(compiler(model)(x), model(x), **TOLERANCE)
    assert compiler.compilations == 1
    model.requires_grad_(True)
    assert step(model, model, x)[1]  # what was drawn can be trained with


@pytest.mark.slow
def test_inductor() -> None:
    # Compiling headers beforehand, trying the processor's instructions and the key of the cache, for which all files of
    # Triton are read, take longer than this model.
    beside = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False, "fx_graph_cache": False}
    with inductor.patch(beside):
        model = cold(nn.Sequential(nn.Linear(8, 16)))
        assert_trains_alike(model, torch.compile(model, fullgraph=True), torch.randn(5, 8))


def test_scales_are_inputs_of_the_graph() -> None:
    compiler, model = Counting(), cold(cold(mlp()), "other")
    compiled, x = compiler(model), torch.randn(5, 8)
    scales: list[Any] = [1.0, 0.3, 0.0, -2.0, {"0": 0.5}, {"2": 0.0}, {"0": 0.0, "2": 0.7}]
    for scale in scales:
        with torch.inference_mode():
            set_scale(model, scale, "other")
        torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
        assert_trains_alike(model, compiled, x)
    assert compiler.compilations == 1


def test_batch_sizes_compile_no_more_often_than_those_of_the_base() -> None:
    counts = []
    for model in (one_layer(), cold(one_layer())):
        compiler = Counting()
        compiled = compiler(model)
        for batch in (2, 3, 5, 7, 11, 13):
            x = torch.randn(batch, 8)
            torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
        counts.append(compiler.compilations)
    assert counts[0] <= counts[1] <= counts[0] + 1  # another order of products may be cheaper for many tokens


def test_all_sizes_symbolic() -> None:
    compiler, model = Counting(), cold(one_layer())
    compiled = compiler(model, dynamic=True)
    for batch in (5, 6, 7):
        assert_trains_alike(model, compiled, torch.randn(batch, 8))
    assert compiler.compilations == 1


@pytest.mark.slow
def test_switching_adapters_and_modes_is_noticed() -> None:
    compiler, model, x = Counting(), cold(cold(one_layer(), dropout=0.5), "other"), torch.randn(5, 8)
    compiled = compiler(model)
    for _ in range(2):
        for change in (model.train, model.eval, lambda: set_active(model, "other"), lambda: set_active(model, [])):
            change()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                out = compiled(x)
                torch.manual_seed(0)
                torch.testing.assert_close(out, model(x), **TOLERANCE)
        with disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
        set_active(model, ["default", "other"])
    assert compiler.compilations <= 6


def test_other_bases_are_compiled_again() -> None:
    model, x = cold(one_layer()), torch.randn(5, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(x)
    delete_adapter(model, "default")
    cold(model)  # equal shapes and numbers, other seed
    torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    assert not torch.allclose(compiled(x), before, atol=1e-3)
    model.double()
    torch.testing.assert_close(compiled(x.double()), model(x.double()))


@pytest.mark.slow
def test_models_of_other_sizes_share_the_compiled_code() -> None:
    for rank, alpha, width in ((2, 4.0, 16), (3, 9.0, 24)):
        model = cold(nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 6)), rank=rank, alpha=alpha)
        assert_trains_alike(model, Counting()(model), torch.randn(5, 8))


def test_injection_into_a_compiled_model_takes_effect() -> None:
    model, x = one_layer(), torch.randn(5, 8)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    cold(compiled)
    torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    assert not torch.allclose(model(x), before, atol=1e-3)


class Hosts(nn.Module):
    """Modules that read their weights, and gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = mlp()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(checkpoint(self.block, tokens, use_reentrant=False)) + self.head.weight.sum()


@pytest.mark.slow
def test_convolutions_attention_read_weights_and_checkpointing() -> None:
    """Both kinds of bases in layers that are called and in weights that are read; convolutions read theirs."""
    torch.manual_seed(0)
    model = Hosts().double()
    cold(model, target_modules=["stem", "head", "attention.out_proj", "block.2"])
    cold(model, "other", target_modules=["attention.in_proj_weight", "block.0"], bases="structured")
    set_active(model, ["default", "other"])
    compiler, x = Counting(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert_trains_alike(model, compiler(model), x)
    assert compiler.compilations == 1
    with torch.no_grad():
        torch.testing.assert_close(compiler(model.eval())(x), model(x))


def test_lora_of_peft_around_adapted_layers() -> None:
    model = cold(one_layer())
    settings = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    compiler, model = Counting(), peft.inject_adapter_in_model(settings, model).requires_grad_(True)
    assert_trains_alike(model, compiler(model), torch.randn(5, 8))
    assert compiler.compilations == 1


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_packed_weights(library: str) -> None:
    base = nn.Sequential(nn.Linear(64, 128), nn.GELU())
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    else:
        linear = pytest.importorskip("bitsandbytes").nn.Linear4bit
        packed = nn.Sequential(linear(64, 128), nn.GELU())
        packed.load_state_dict(base.state_dict())
        base = packed.to("cpu")
    model, x = cold(base, rank=8), torch.randn(5, 64)
    for mode in (torch.enable_grad, torch.no_grad):
        compiler = Counting()
        compiled = compiler(model)
        with mode():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert compiler.compilations == 1


def test_stored_bases_and_autocast() -> None:
    compiler, model, x = Counting(), cold(one_layer(), rank=4), torch.randn(5, 8)
    own = stored_bases(torch.randn(4, 8), torch.randn(16, 8))
    for _, _, _, state in adapted_modules(model):
        state.slots["default"].bases = own
    assert_trains_alike(model, compiler(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiler(model)(x), model(x), rtol=0.1, atol=0.1)
    assert compiler.compilations == 2


@pytest.mark.parametrize(
    ("bases", "shapes"),
    [("uniform", [(2, 8), (8, 8)]), ("structured", [(2, 2), (4, 2, 2), (4, 4), (8,)])],
)
def test_the_bases_are_inputs_of_the_graph(bases: str, shapes: list[tuple[int, ...]]) -> None:
    """Those of three layers of one shape, once."""
    given: list[Tensor] = []

    def backend(graph: Any, inputs: Any) -> Any:
        given.extend(tensor for tensor in inputs if isinstance(tensor, nn.Parameter) and not tensor.requires_grad)
        assert not [*graph.parameters(), *graph.buffers()]
        return graph

    model = cold(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), bases=bases).requires_grad_(True)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(5, 8))
    assert sorted(tuple(tensor.shape) for tensor in given) == shapes


@pytest.mark.slow
def test_a_run_compiles_each_of_its_states_once() -> None:
    """Steps of an optimiser, scales, batch sizes, evaluation of the base, and sets of adapters, again and again."""
    compiler, model = Counting(), cold(cold(one_layer()), "other")
    compiled, optimizer = compiler(model), torch.optim.SGD([p for _, p in adapter_parameters(model)], lr=1e-3)
    counts = []
    for _ in range(3):
        for active in ("default", "other", ["default", "other"]):
            set_active(model, active)
            for batch, scale in ((5, 1.0), (9, 0.0), (14, 0.5)):
                set_scale(model, scale, "other")
                x = torch.randn(batch, 8)
                torch._dynamo.mark_dynamic(x, 0)
                optimizer.zero_grad()
                compiled(x).square().sum().backward()
                optimizer.step()
            with torch.no_grad(), disabled(model):
                compiled(x)
        counts.append(compiler.compilations)
    assert counts == [4, 4, 4]  # two adapters, both, and the base


@pytest.mark.parametrize("kind", ["uniform", pytest.param("structured", marks=pytest.mark.slow)])
def test_other_adapters_per_sample_are_not_compiled_again(kind: str) -> None:
    model, seed = mlp(), next(SEEDS)  # adapters of one seed share their bases
    for name in ("a", "b", "c"):
        cold(model, name, bases=kind, seed=seed)
    compiler, x = Counting(), torch.randn(3, 5, 8)
    compiled = compiler(model)
    with torch.no_grad():
        for names in (["a", "b", "a"], ["c", "c", "b"], [None, "a", "b"]):
            with per_sample(model, names):
                torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    assert compiler.compilations == 1
    with per_sample(model, ["a", "b", "c"]), pytest.raises(Exception, match="enter the block within torch.no_grad"):
        compiler(model)(x)


def test_copies_compile() -> None:
    model, x = cold(one_layer()), torch.randn(5, 8)
    compiled = Counting()(copy.deepcopy(model))
    torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
