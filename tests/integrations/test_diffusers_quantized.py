"""Denoisers with weights packed by the quantisation libraries themselves, on the CPU.

The reference is a plain denoiser with the unpacked weights and the same adapter. 8-bit layers of bitsandbytes round
their inputs too, so their outputs are compared with a larger tolerance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, load_adapter, merge, remove, save_adapter
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize
from tests.pipeline_helpers import difference
from tests.tiny_pipelines import PIPELINES, sample

CONFIG = RandLoRAConfig(rank=4, target_modules="diffusers:backbone")
Pack = Callable[[nn.Linear], nn.Linear]


def four_bits(layer: nn.Linear) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
    )
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def int8(layer: nn.Linear) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def unpacked(layer: Any) -> Tensor:
    """The values that a packed weight represents."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize()


KINDS: dict[str, tuple[Pack, float]] = {
    "bnb 4-bit": (four_bits, 1e-4),
    "bnb 8-bit": (eight_bits, 0.05),
    "torchao int8": (int8, 1e-4),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def packed_pipeline(kind: str) -> Any:
    """Flux with every linear layer of its transformer's blocks packed."""
    pipe = PIPELINES["flux"]()
    pack = KINDS[kind][0]
    pipe.transformer.requires_grad_(False)
    for path, module in list(pipe.transformer.named_modules()):
        if "transformer_blocks." in path and type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(pipe.transformer.get_submodule(parent), name, pack(module))
    return pipe


def plain_pipeline(packed: Any) -> Any:
    """The same values in plain layers."""
    pipe = PIPELINES["flux"]()
    with torch.no_grad():
        for path, module in pipe.transformer.named_modules():
            if "transformer_blocks." in path and type(module) is nn.Linear:
                module.weight.copy_(unpacked(packed.transformer.get_submodule(path)))
    return pipe


def contents(model: nn.Module) -> dict[str, bytes]:
    """The bits of every packed weight."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks." in path:
            weight = module.weight
            raw = weight.dequantize() if type(weight).__module__.startswith("torchao") else weight.data
            found[path] = raw.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def loss(pipe: Any) -> Tensor:
    """A number that depends on the whole transformer, for fixed inputs."""
    draw = torch.Generator().manual_seed(3)
    hidden, text = torch.randn(1, 16, 16, generator=draw), torch.randn(1, 5, 24, generator=draw)
    image_ids, text_ids = torch.zeros(16, 3), torch.zeros(5, 3)
    image_ids[:, 1] = torch.arange(16)
    output = pipe.transformer(
        hidden_states=hidden,
        encoder_hidden_states=text,
        pooled_projections=torch.randn(1, 32, generator=draw),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=image_ids,
        txt_ids=text_ids,
    ).sample
    return (output - torch.randn(output.shape, generator=draw)).square().mean()


def test_packed_denoisers_train_save_and_reload(kind: str, tmp_path: Path) -> None:
    pipe = packed_pipeline(kind)
    base, before = sample(pipe), contents(pipe.transformer)
    report = inject(pipe.transformer, CONFIG)
    assert {target.kind for target in report.targets} == {"quantized"}
    assert torch.equal(sample(pipe), base)
    trained = [parameter for _, parameter in adapter_parameters(pipe.transformer)]
    assert [p for p in pipe.transformer.parameters() if p.requires_grad] == trained
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(pipe)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    image = sample(pipe)
    assert difference(image, base) > 0.01
    path = integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    other = packed_pipeline(kind)
    integration.load_adapter(other, path)
    assert torch.equal(sample(other), image)
    with integration.disabled(other):
        assert torch.equal(sample(other), base)
    with pytest.raises(ValueError, match="is quantised.*dequantise the base to merge"):
        integration.fuse(other)
    assert torch.equal(sample(other), image)
    integration.delete_adapter(other, "default")
    assert torch.equal(sample(other), base)
    assert contents(other.transformer) == contents(pipe.transformer) == before


def test_they_compute_what_the_unpacked_model_does(kind: str, tmp_path: Path) -> None:
    close = KINDS[kind][1]
    pipe = packed_pipeline(kind)
    plain = plain_pipeline(pipe)
    inject(pipe.transformer, CONFIG)
    randomize(pipe.transformer)
    # An adapter of the packed model can be loaded into the plain one and merged there.
    load_adapter(plain.transformer, save_adapter(pipe.transformer, tmp_path / "a.safetensors"), trainable=True)
    for each in (pipe, plain):
        loss(each).backward()
    for (name, packed), (_, expected) in zip(
        adapter_parameters(pipe.transformer), adapter_parameters(plain.transformer), strict=True
    ):
        assert packed.grad is not None and expected.grad is not None, name
        assert (packed.grad - expected.grad).norm() <= close * expected.grad.norm(), name
    assert difference(sample(pipe), sample(plain)) < close
    merge(plain.transformer)
    assert difference(sample(pipe), sample(plain)) < close
    remove(plain.transformer)


def test_diffusers_own_loading_with_torchao(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import FluxTransformer2DModel, TorchAoConfig

    PIPELINES["flux"]().transformer.save_pretrained(tmp_path / "model")
    images = []
    for path in (None, tmp_path / "adapter.safetensors"):
        pipe = PIPELINES["flux"]()
        pipe.transformer = FluxTransformer2DModel.from_pretrained(
            tmp_path / "model",
            quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
            dtype=torch.bfloat16,
        )
        for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            part.to(torch.bfloat16)
        if path is None:
            base = sample(pipe)
            inject(pipe.transformer, CONFIG)
            randomize(pipe.transformer)
            integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
        else:
            assert torch.equal(sample(pipe), base)
            integration.load_adapter(pipe, path)
        images.append(sample(pipe))
    assert torch.equal(*images) and difference(images[0], base) > 0.01


def test_hooks_of_accelerate_keep_no_forward_without_the_adapter() -> None:
    # device_map adds hooks to every packed layer, which keep a reference to the original forward.
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe, hooked = packed_pipeline("torchao int8"), packed_pipeline("torchao int8")
    base = sample(pipe)
    for module in hooked.transformer.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    for each in (pipe, hooked):
        inject(each.transformer, CONFIG)
        randomize(each.transformer)
    image = sample(pipe)
    assert difference(image, base) > 0.01 and torch.equal(sample(hooked), image)
    remove_hook_from_module(hooked.transformer, recurse=True)
    assert torch.equal(sample(hooked), image)
    remove(hooked.transformer)
    assert torch.equal(sample(hooked), base)
