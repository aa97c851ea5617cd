"""Other changes that diffusers and accelerate make to a pipeline: offloading, casting, compiling, other attention.

Each either gives the images of the plain adapted pipeline, before and after the adapter is loaded, or refuses clearly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_vision import RandLoRAConfig, adapter_parameters, check_gradients, inject, merge, unmerge
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize
from tests.pipeline_helpers import adapt, difference, few_targets
from tests.tiny_pipelines import PIPELINES, sample, shallow_sd15

CLOSE = 2e-3
CPU = torch.device("cpu")
orders = pytest.mark.parametrize("loaded", ["before", "after"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    return integration.save_adapter(pipe, tmp_path_factory.mktemp("adapter") / "adapter.safetensors")


@pytest.fixture(scope="module")
def image(adapter: Path) -> Tensor:
    return sample(loaded_pipeline(adapter))


@pytest.fixture(scope="module")
def base() -> Tensor:
    return sample(PIPELINES["sd15"]())


def loaded_pipeline(adapter: Path) -> Any:
    pipe = PIPELINES["sd15"]()
    integration.load_adapter(pipe, adapter)
    return pipe


def around(loaded: str, adapter: Path, change: Any, make: Callable[[], Any] = PIPELINES["sd15"]) -> Any:
    """Return a pipeline that was changed before or after the adapter was loaded."""
    pipe = make()
    if loaded == "before":
        integration.load_adapter(pipe, adapter)
    change(pipe)
    if loaded == "after":
        integration.load_adapter(pipe, adapter)
    return pipe


@orders
def test_offloading_whole_models(loaded: str, adapter: Path, image: Tensor, base: Tensor) -> None:
    pipe = around(loaded, adapter, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))
    assert torch.equal(sample(pipe), image)
    integration.fuse(pipe)
    assert difference(sample(pipe), image) < CLOSE
    integration.unfuse(pipe)
    integration.delete_adapter(pipe, "default")
    assert torch.equal(sample(pipe), base)


def sequential(pipe: Any) -> None:
    # What enable_sequential_cpu_offload calls for every part; with a CPU to compute on, diffusers' own call fails.
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, CPU)


def grouped(kind: str) -> Any:
    def offload(pipe: Any) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)

    return offload


OFFLOADS = {"sequential": sequential, "leaf_level": grouped("leaf_level"), "block_level": grouped("block_level")}


@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_layer_by_layer_comes_after_the_adapters(kind: str, adapter: Path) -> None:
    call = "sequential_cpu_offload" if kind == "sequential" else "group_offload"
    inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 5, 32))
    with torch.no_grad():
        plain = loaded_pipeline(adapter)
        expected, bare = plain.unet(**inputs).sample, PIPELINES["sd15"]().unet(**inputs).sample
        pipe = around("before", adapter, OFFLOADS[kind])
        assert torch.equal(pipe.unet(**inputs).sample, expected)
        with integration.disabled(pipe):
            assert torch.equal(pipe.unet(**inputs).sample, bare)
        integration.set_scales(plain, 0.5)
        integration.set_scales(pipe, 0.5)
        assert torch.equal(pipe.unet(**inputs).sample, plain.unet(**inputs).sample)
    changes = {
        "fuse adapters": lambda: integration.fuse(pipe),
        "unfuse adapters": lambda: integration.unfuse(pipe),
        "delete an adapter": lambda: integration.delete_adapter(pipe, "default"),
        "load an adapter": lambda: integration.load_adapter(pipe, adapter, "more"),
    }
    if kind == "sequential":
        del changes["load an adapter"]  # it finds no weights at all: see below
    for what, change in changes.items():
        with pytest.raises(ValueError, match=f"cannot {what}: unet.* layer by layer.*; {what} before enable_{call}"):
            change()
    with pytest.raises(ValueError, match=f"cannot load an adapter: .* before enable_{call}"):
        around("after", adapter, OFFLOADS[kind])
    integration.fuse(plain)
    OFFLOADS[kind](plain)
    with pytest.raises(ValueError, match="cannot disable merged adapters"), integration.disabled(plain):
        pass


@orders
def test_layerwise_casting_leaves_the_adapter_in_float32(loaded: str, adapter: Path) -> None:
    def cast(pipe: Any) -> None:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    pipe = around(loaded, adapter, lambda pipe: (pipe.to(torch.bfloat16), cast(pipe)))
    assert {p.dtype for _, p in adapter_parameters(pipe.unet)} == {torch.float32}
    assert pipe.unet.dtype == torch.bfloat16 and torch.float8_e4m3fn in {p.dtype for p in pipe.unet.parameters()}
    rounded = PIPELINES["sd15"]()
    rounded.to(torch.bfloat16)
    cast(rounded)
    with torch.no_grad():
        for parameter in rounded.unet.parameters():
            if parameter.dtype == torch.float8_e4m3fn:
                parameter.data = parameter.data.to(torch.bfloat16)
    plain = PIPELINES["sd15"]()
    plain.to(torch.bfloat16)
    plain.unet.load_state_dict({k: v.to(torch.bfloat16) for k, v in rounded.unet.state_dict().items()})
    integration.load_adapter(plain, adapter)
    assert (
        difference(sample(pipe).float(), sample(plain).float())
        < 0.05
        < difference(sample(pipe).float(), sample(without(plain)).float())
    )
    integration.delete_adapter(pipe, "default")
    assert not any("_randlora_" in name for name in pipe.unet.state_dict())
    sample(pipe)


def without(pipe: Any) -> Any:
    integration.delete_adapter(pipe, "default")
    return pipe


@orders
def test_half_precision_keeps_the_adapter_in_float32(loaded: str, adapter: Path, image: Tensor, tmp_path: Path) -> None:
    pipe = around(loaded, adapter, lambda pipe: pipe.to(torch.bfloat16))
    assert pipe.dtype == pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert {p.dtype for _, p in adapter_parameters(pipe.unet)} == {torch.float32}
    assert integration.save_adapter(pipe, tmp_path / "a.safetensors").read_bytes() == adapter.read_bytes()
    pipe.to(torch.float32)
    low = PIPELINES["sd15"]()
    low.to(torch.bfloat16)
    low.to(torch.float32)
    integration.load_adapter(low, adapter)
    assert torch.equal(sample(pipe), sample(low)) and difference(sample(low), image) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("loaded", "in_place"), [("before", False), ("after", True)])
def test_compiled_denoisers(loaded: str, in_place: bool, tmp_path: Path) -> None:
    def compile_it(pipe: Any) -> None:
        if in_place:
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")

    plain = shallow_sd15()
    base = sample(plain)
    few_targets(plain.unet, "to_q", "to_out.0")
    image = sample(plain)
    adapter = integration.save_adapter(plain, tmp_path / "adapter.safetensors")

    pipe = around(loaded, adapter, compile_it, shallow_sd15)
    assert difference(sample(pipe), image) < CLOSE < difference(base, image)  # another order of products
    with integration.disabled(pipe):
        assert torch.equal(sample(pipe), base)
    integration.fuse(pipe)
    assert difference(sample(pipe), image) < CLOSE


@orders
def test_other_attention(loaded: str, adapter: Path, image: Tensor) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipe = around(loaded, adapter, lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()))
    assert difference(sample(pipe), image) < CLOSE
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(sample(pipe), image)
    pipe.enable_attention_slicing()
    assert difference(sample(pipe), image) < CLOSE


FUSED = {"sd15": {"to_qkv", "to_kv"}, "sd3": {"to_qkv", "to_added_qkv"}, "flux": {"to_qkv", "to_added_qkv"}}


@pytest.mark.parametrize("family", FUSED)
def test_projections_are_fused_before_the_adapters(family: str, tmp_path: Path) -> None:
    config = RandLoRAConfig(rank=4, target_modules="diffusers:attention")
    pipe, other = (fused(PIPELINES[family]()) for _ in range(2))
    model = pipe.components.get("unet") or pipe.transformer
    before = sample(pipe)
    report = inject(model, config)
    names = {target.name.rpartition(".")[2] for target in report.targets}
    assert FUSED[family] <= names and not names & {"to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    randomize(model)
    image = sample(pipe)
    assert difference(image, before) > 0.1
    merge(model)
    assert difference(sample(pipe), image) < CLOSE
    unmerge(model)
    integration.load_adapter(other, integration.save_adapter(pipe, tmp_path / "adapter.safetensors"))
    assert torch.equal(sample(other), image)
    with pytest.raises(ValueError, match="does not fit"):
        integration.load_adapter(PIPELINES[family](), tmp_path / "adapter.safetensors")


def fused(pipe: Any) -> Any:
    (pipe.components.get("unet") or pipe.transformer).fuse_qkv_projections()
    return pipe


@pytest.mark.parametrize("family", FUSED)
def test_fusing_adapted_projections_is_refused(family: str) -> None:
    pipe = PIPELINES[family]()
    adapt(pipe, text=False)
    image = sample(pipe)
    with pytest.raises(RuntimeError, match="fuse before adding the adapters"):
        fused(pipe)
    assert torch.equal(sample(pipe), image)


def test_gradients_reach_every_adapter_of_an_unfused_model() -> None:
    pipe = fused(PIPELINES["sd15"]())
    pipe.unet.unfuse_qkv_projections()
    inject(pipe.unet, RandLoRAConfig(rank=4, target_modules="diffusers:attention"))
    inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 5, 32))
    pipe.unet(**inputs).sample.square().mean().backward()
    check_gradients(pipe.unet)
