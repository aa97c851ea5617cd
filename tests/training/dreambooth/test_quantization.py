"""Quantised bases, and what a dry run says about memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_vision.training.dreambooth import quantization
from randlora_vision.training.dreambooth.batches import DiffusionBatch, Prompts
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.dry_run import measure
from randlora_vision.training.dreambooth.families import Family
from randlora_vision.training.dreambooth.loading import load_family
from randlora_vision.training.dreambooth.loss import DiffusionLoss
from randlora_vision.training.dreambooth.methods import adapt
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import (
    DreamBoothAdapterOptions,
    DreamBoothOptions,
    DreamBoothTrainingOptions,
    PipelineOptions,
)
from randlora_vision.training.dreambooth.samples import Gallery, Sampler, largest_difference
from tests.tiny_families import TINY
from tests.tiny_pipelines import CONTEXT, PIPELINES

PROMPT = "a photo of sks digit"
MAKERS = {**PIPELINES, **TINY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def saved(name: str) -> str:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("bases") / name
            MAKERS[name]().save_pretrained(made[name])
        return str(made[name])

    return saved


def gallery(family: Family) -> Gallery:
    return Gallery(Sampler(family, (16, 16), 2, nullcontext, steps=2, guidance=3.0), [PROMPT], 1, 1, False)


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """Write a model with diffusers' names, its weights in blocks of 32 eight-bit numbers where they have so many."""
    import gguf

    eight = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quantize(tensor.numpy(), eight)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=eight)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether torchao, whose class has another name in every other version, or bitsandbytes holds a weight."""
    from bitsandbytes.nn import Int8Params, Params4bit
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, (TorchAOBaseTensor, Int8Params, Params4bit))


@pytest.fixture
def bitsandbytes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes there too; only diffusers asks for a GPU. For AVX512-BF16 it packs weights, in multiples of 32 only,
    which these models are too small for."""
    import bitsandbytes
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(getattr(bnb_quantizer, name), "update_device_map", lambda _, found: found or {"": "cpu"})
    monkeypatch.setattr(quantization, "require_library", lambda kind: None)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.mark.parametrize(
    ("quantize", "method"),
    [
        ("torchao-int8", "randlora"),
        ("torchao-int8", "lora"),
        ("gguf", "randlora"),
        ("gguf", "lora"),
        ("bnb-nf4", "randlora"),
        ("bnb-int8", "randlora"),
    ],
)
def test_an_adapter_of_a_quantised_base_works_on_it_and_on_the_plain_one(
    quantize: Any, method: Any, folder: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    library = quantize.partition("-")[0].replace("bnb", "bitsandbytes")
    pytest.importorskip(library)
    if library == "bitsandbytes":
        request.getfixturevalue("bitsandbytes_on_a_cpu")
    base, file = folder("flux"), tmp_path / "denoiser.gguf"
    if quantize == "gguf":
        write_gguf(PIPELINES["flux"]().transformer, file)

    def load(kind: Any) -> Family:
        given = str(file) if kind == "gguf" else None
        return load_family(base, ObjectiveOptions(), CONTEXT, quantize=kind, gguf_file=given)

    family = load(quantize)
    assert family.dtype == torch.float32
    to_q = family.pipe.transformer.transformer_blocks[0].attn.to_q.weight
    if quantize == "gguf":
        assert to_q.dtype == torch.uint8 and type(to_q).__name__ == "GGUFParameter"
    else:
        layers = (family.pipe.transformer.transformer_blocks[0].attn.to_q, family.pipe.text_encoder_2.encoder.block[0])
        assert all(any(is_quantised(p) for p in layer.parameters()) for layer in layers)
    plain = {type(p).__name__ for p in family.pipe.text_encoder.parameters()}
    assert plain == {"Parameter"}  # CLIP can be trained and is small
    options = DreamBoothOptions(adapter=DreamBoothAdapterOptions(method=method, rank=4, alpha=80.0))
    adaptation = adapt(family, resolve(options))
    loss = DiffusionLoss(family, {}, Prompts(family, [PROMPT], False), 1.0, cached_latents=False)
    parameters = [parameter for _, parameter in adaptation.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    batch = DiffusionBatch(
        inputs=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        captions=torch.zeros(2, dtype=torch.long),
        prior=torch.zeros(2, dtype=torch.bool),
        sizes=torch.zeros(2, 6, dtype=torch.long),
        masks=torch.ones(2, 1, 1, 1),
        seeds=torch.arange(2),
        given=torch.zeros(2, 0),
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    adaptation.save(tmp_path / "adapter.safetensors")
    pictures = gallery(family).draw()
    differences = []
    for kind in (quantize, None):
        other = load(kind)
        before = gallery(other).draw()
        adaptation.load(other.pipe, tmp_path / "adapter.safetensors")
        after = gallery(other).draw()
        differences.append(largest_difference(after, pictures))
        assert largest_difference(before, after) > 0.01
    assert differences[0] == 0 and differences[1] < 0.1  # the plain base differs by the rounding of its weights


def test_configurations_of_libraries_that_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="bnb-nf4: diffusers quantises with bitsandbytes on a GPU only"):
        quantization.quantized("bnb-nf4", ["transformer"], [], torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind, bits in (("bnb-nf4", 4), ("bnb-int8", 8)):
        found = quantization.quantized(kind, ["transformer"], ["text_encoder_2"], torch.bfloat16)  # type: ignore[arg-type]
        parts = found.quant_mapping
        assert {name: type(part).__module__.partition(".")[0] for name, part in parts.items()} == {
            "transformer": "diffusers",
            "text_encoder_2": "transformers",
        }
        for part in parts.values():
            assert (part.load_in_4bit, part.load_in_8bit) == (bits == 4, bits == 8)
            if bits == 4:
                assert part.bnb_4bit_quant_type == "nf4" and part.bnb_4bit_compute_dtype == torch.bfloat16
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--quantize gguf needs gguf, which is not installed: pip install gguf"):
        quantization.require_library("gguf")


def test_options_of_quantisation() -> None:
    for options, message in (
        ({"quantize": "gguf"}, "--quantize gguf and --gguf-file go together"),
        ({"gguf_file": "x.gguf"}, "--quantize gguf and --gguf-file go together"),
    ):
        with pytest.raises(ValueError, match=message):
            PipelineOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--quantize is for a frozen base"):
        DreamBoothOptions(
            pipeline=PipelineOptions(quantize="torchao-int8"), adapter=DreamBoothAdapterOptions(method="full")
        )


@pytest.mark.parametrize(("name", "method"), [("sd15", "randlora"), ("flux", "lora"), ("qwen_image", "randlora"),
                                              ("sana", "full")])  # fmt: skip
def test_a_dry_run_says_what_the_loaded_pipeline_has(name: str, method: Any, folder: Any, tmp_path: Path) -> None:
    options = DreamBoothOptions(
        adapter=DreamBoothAdapterOptions(method=method, rank=None if method == "full" else 4),
        training=DreamBoothTrainingOptions(use_8bit_adam=name == "flux"),
    )
    settings = resolve(options)
    needs = measure(folder(name), settings, torch.float32)
    family = load_family(folder(name), ObjectiveOptions(), CONTEXT)
    modules = {part: module for part, module in family.pipe.components.items() if isinstance(module, torch.nn.Module)}
    for part in needs.parts:
        parameters = list(modules.pop(part.name).parameters())
        assert part.parameters == sum(p.numel() for p in parameters) and part.bytes == 4 * part.parameters
    assert not modules
    adaptation = adapt(family, settings)
    numbers = sum(parameter.numel() for _, parameter in adaptation.parameters())
    adaptation.save(tmp_path / "adapter.safetensors")
    assert needs.trained_numbers == numbers
    assert needs.file_bytes == pytest.approx((tmp_path / "adapter.safetensors").stat().st_size, rel=0.02, abs=8192)
    each = {"flux": 10, "sana": 12}  # of 8-bit Adam; of full fine-tuning, whose numbers are those of the pipeline
    assert needs.state_bytes == numbers * each.get(name, 16)
    assert needs.training_bytes < needs.peak_bytes + needs.state_bytes + needs.bases_bytes
    assert f"adapter: {numbers:,} trained numbers" in str(needs)


@pytest.mark.parametrize(("name", "units"), [("flux", ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
                                             ("sd15", ("BasicTransformerBlock", "ResnetBlock2D"))])  # fmt: skip
def test_a_dry_run_counts_one_block_of_an_offloaded_denoiser(name: str, units: tuple[str, ...], folder: Any) -> None:
    def needs(place: Any) -> Any:
        return measure(folder(name), resolve(DreamBoothOptions(pipeline=PipelineOptions(offload_base=place))), kind)

    kind = torch.bfloat16
    denoiser = load_family(folder(name), ObjectiveOptions(), CONTEXT).denoiser
    sizes = [2 * sum(p.numel() for p in m.parameters()) for m in denoiser.modules() if type(m).__name__ in units]
    whole = 2 * sum(p.numel() for p in denoiser.parameters())
    plain, offloaded = needs(None), needs("disk")
    assert plain.training_bytes - offloaded.training_bytes == whole - max(sizes) > 0
    assert f"on disk: {whole:,} bytes of the {'unet' if name == 'sd15' else 'transformer'}" in str(offloaded)
    assert f"on the device a block of up to {max(sizes):,} bytes" in str(offloaded)
    assert "in main memory" in str(needs("cpu")) and "block" not in str(plain)


def test_a_dry_run_counts_quantised_parts(folder: Any) -> None:
    def sizes(kind: Any) -> dict[str, int]:
        pipeline = PipelineOptions(quantize=kind)
        needs = measure(folder("flux"), resolve(DreamBoothOptions(pipeline=pipeline)), torch.bfloat16)
        return {part.name: part.bytes for part in needs.parts}

    plain, eight, four = sizes(None), sizes("torchao-int8"), sizes("bnb-nf4")
    for name in ("transformer", "text_encoder_2"):
        assert four[name] < eight[name] < plain[name]
    assert {plain[name] - eight[name] for name in ("vae", "text_encoder")} == {0}
