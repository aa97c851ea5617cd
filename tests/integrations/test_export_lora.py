"""LoRA files: loaded by diffusers and PEFT themselves, compared with the dense update's own best approximation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, merge, set_active, set_scale
from randlora_vision.cli.actions import CONVERSIONS
from randlora_vision.integrations.export.lora import FORMATS, export_lora
from tests.helpers import IMAGES, clip, dense_weights, randomize, snapshot, vit
from tests.tiny_pipelines import PIPELINES, sample

CONFIG = RandLoRAConfig(rank=4, target_modules="all", seed=3)


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of the given rank, computed by NumPy in float64."""
    u, s, v = np.linalg.svd(delta.double().flatten(1).numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(delta.shape)


@torch.no_grad()
def reduce_updates(base: nn.Module, adapted: nn.Module, report: Any, rank: int | None = None) -> None:
    """Add the dense updates of `report` to the plain `base`, cut down to `rank`."""
    for path, weight in dense_weights(copy.deepcopy(base).double(), adapted.state_dict(), report).items():
        own = base.get_parameter(path)
        delta = weight - own.double()
        own.add_(delta if rank is None else truncated(delta, rank))


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def loadable(pipe: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if name in pipe._lora_loadable_modules]


def adapted_pipe(kind: str, config: RandLoRAConfig = CONFIG) -> tuple[Any, dict[str, Any]]:
    """A pipeline with adapters in its denoiser and every text encoder that LoRA can be loaded into."""
    pipe = PIPELINES[kind]()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    reports = {name: inject(denoiser(pipe), config)}
    text = RandLoRAConfig(rank=8, target_modules=["q_proj", "out_proj", "fc1"], seed=3)
    reports |= {part: inject(getattr(pipe, part), text) for part in loadable(pipe)}
    for seed, part in enumerate(reports):
        randomize(getattr(pipe, part), seed=seed)
    return pipe, reports


@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_loads_the_best_approximation(kind: str, tmp_path: Path) -> None:
    pipe, reports = adapted_pipe(kind)
    base = sample(PIPELINES[kind]())
    exported = export_lora(pipe, tmp_path / "lora.safetensors", rank=6)
    assert {layer.rank for layer in exported.layers} == ({4, 6} if "sd1" in kind or kind == "sdxl" else {6})
    file = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    assert {len(tensor) for key, tensor in file.items() if "lora_A" in key} == {6}  # older diffusers need one rank
    low_rank, loaded = PIPELINES[kind](), PIPELINES[kind]()
    for part, report in reports.items():
        reduce_updates(getattr(low_rank, part), getattr(pipe, part), report, 6)
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    expected, image = sample(low_rank), sample(loaded)
    torch.testing.assert_close(image, expected, atol=5e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01
    assert (expected - sample(pipe)).abs().max() > 1e-3  # something was cut off


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_at_full_rank_diffusers_shows_the_adapter_itself(kind: str, tmp_path: Path) -> None:
    pipe, _ = adapted_pipe(kind)
    assert export_lora(pipe, tmp_path / "lora.safetensors", energy=1.0).error < 1e-5
    loaded = PIPELINES[kind]()
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(sample(loaded), sample(pipe), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohya_files_load_like_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    pipe, reports = adapted_pipe(kind)
    export_lora(pipe, tmp_path / "kohya.safetensors", rank=6, format="kohya")
    loaded, low_rank = PIPELINES[kind](), PIPELINES[kind]()
    loaded.load_lora_weights(tmp_path / "kohya.safetensors")
    for part, report in reports.items():
        reduce_updates(getattr(low_rank, part), getattr(pipe, part), report, 6)
    torch.testing.assert_close(sample(loaded), sample(low_rank), atol=1e-4, rtol=1e-4)
    keys = safetensors.torch.load_file(tmp_path / "kohya.safetensors")
    text = "lora_te1_" if kind == "sdxl" else "lora_te_"
    assert f"{text}text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in keys
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha" in keys
    assert "lora_unet_conv_in.lora_up.weight" in keys


def test_kohya_files_for_flux_stack_the_layers_of_diffusers(tmp_path: Path) -> None:
    pipe, _ = adapted_pipe("flux")
    model = pipe.transformer
    export_lora(model, tmp_path / "kohya.safetensors", energy=1.0, format="kohya")
    file = safetensors.torch.load_file(tmp_path / "kohya.safetensors")

    def product(key: str) -> Tensor:
        up, down = file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"]
        return up @ down * (file[f"{key}.alpha"] / len(down))

    def delta(path: str) -> Tensor:
        layer = model.get_submodule(path)
        return (layer.weight - layer.base_weight()).detach()

    single = "single_transformer_blocks.0"
    stacked = torch.cat([delta(f"{single}.{part}") for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    torch.testing.assert_close(product("lora_unet_single_blocks_0_linear1"), stacked, atol=1e-5, rtol=1e-4)
    scale, shift = delta("norm_out.linear").chunk(2)
    swapped = torch.cat([shift, scale])
    torch.testing.assert_close(product("lora_unet_final_layer_adaLN_modulation_1"), swapped, atol=1e-5, rtol=1e-4)


def test_diffusers_unstacks_a_kohya_file_for_flux(tmp_path: Path) -> None:
    # The converter hard-codes the width of the single blocks, so only the double blocks can be small.
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_v_proj", "transformer_blocks.0.ff.net.2"]
    config = RandLoRAConfig(rank=4, target_modules=[f"^{n}$"[1:-1] for n in names], exclude_modules=r"single_.*")
    pipe, _ = adapted_pipe("flux", config)
    export_lora(pipe, tmp_path / "kohya.safetensors", energy=1.0, format="kohya")
    loaded = PIPELINES["flux"]()
    loaded.load_lora_weights(tmp_path / "kohya.safetensors")
    torch.testing.assert_close(sample(loaded), sample(pipe), atol=1e-4, rtol=1e-4)


def test_lycoris_files_hold_whole_updates(tmp_path: Path) -> None:
    pipe, _ = adapted_pipe("sd15")
    report = export_lora(pipe, tmp_path / "full.safetensors", format="lycoris")
    assert report.error == 0 and report.layers[0].rank is None
    file = safetensors.torch.load_file(tmp_path / "full.safetensors")
    patched = PIPELINES["sd15"]()
    known = {f"lora_unet_{path.replace('.', '_')}": module for path, module in patched.unet.named_modules()}
    text = patched.text_encoder.named_modules()
    known |= {f"lora_te_text_model_{path.replace('.', '_')}": module for path, module in text}
    with torch.no_grad():
        for key, diff in file.items():
            known[key.removesuffix(".diff")].weight += diff
    torch.testing.assert_close(sample(patched), sample(pipe), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_peft_loads_the_folder(kind: str, tmp_path: Path) -> None:
    make = vit if kind == "timm" else clip
    config = RandLoRAConfig(rank=4, target_modules="all", alpha=12, modules_to_save=["head"] if kind == "timm" else [])
    model, base = make(), make()
    report = inject(model, config)
    randomize(model)
    if kind == "timm":
        nn.init.normal_(model.head.weight)
    exported = export_lora(model, tmp_path / "lora", rank=9, format="peft")
    reduce_updates(base, model, report, 9)
    if kind == "timm":
        base.head.load_state_dict(model.head.state_dict())
    loaded = PeftModel.from_pretrained(make(), str(tmp_path / "lora"))
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    inputs = (images,) if kind == "timm" else (images, torch.randint(0, 32, (2, 8)))
    for got, expected, adapted in zip(_run(loaded, inputs), _run(base, inputs), _run(model, inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert (expected - adapted).abs().max() > 1e-2
    assert 0 < exported.error < 1


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        out = model.eval()(*inputs)
    return [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor.ndim]


def test_peft_gets_zeros_for_the_projection_that_is_not_adapted(tmp_path: Path) -> None:
    for name in ("in_proj_weight", "out_proj"):
        model = clip()
        inject(model, RandLoRAConfig(rank=4, target_modules=[name]))
        randomize(model)
        export_lora(model, tmp_path / name, energy=1.0, format="peft")
        loaded = PeftModel.from_pretrained(clip(), str(tmp_path / name))
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model.encode_image(images)
            torch.testing.assert_close(loaded.encode_image(images), expected, atol=1e-5, rtol=1e-5)
            assert (clip().encode_image(images) - expected).abs().max() > 1e-3


def test_peft_takes_layers_of_different_rank(tmp_path: Path) -> None:
    model = vit()
    inject(model, RandLoRAConfig(rank=4, target_modules="all"))
    randomize(model)
    report = export_lora(model, tmp_path / "lora", energy=1.0, format="peft")
    assert {layer.rank for layer in report.layers} >= {5, 32}
    loaded = PeftModel.from_pretrained(vit(), str(tmp_path / "lora"))
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_run(loaded, (images,)), _run(model, (images,)), atol=1e-4, rtol=1e-4)


def test_the_reported_error_is_what_is_lost(tmp_path: Path) -> None:
    model, base = vit(), vit()
    planned = inject(model, RandLoRAConfig(rank=4, target_modules=["qkv", "fc2"]))
    randomize(model)
    report = export_lora(model, tmp_path / "lora.safetensors", rank=5)
    lost = total = 0.0
    by_name = {layer.name: layer for layer in report.layers}
    for path, weight in dense_weights(copy.deepcopy(base).double(), model.state_dict(), planned).items():
        delta = (weight - base.get_parameter(path).double()).detach()
        off = (delta - truncated(delta, 5)).norm() ** 2
        assert by_name[path].error == pytest.approx(float((off / delta.norm() ** 2).sqrt()), rel=1e-4)
        assert by_name[path].norm == pytest.approx(float(delta.norm()), rel=1e-5)
        lost, total = lost + float(off), total + float(delta.norm() ** 2)
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    with safetensors.safe_open(tmp_path / "lora.safetensors", "pt") as file:
        stored = json.loads(file.metadata()["randlora_export"])
    assert stored["error"] == report.error
    assert stored["layers"][0]["error"] == report.layers[0].error
    assert stored["choice"] == {"rank": 5, "energy": None}
    assert f"{report.error:.2%}" in str(report) and "blocks.1.mlp.fc2.weight" in str(report)


def test_energy_takes_the_smallest_rank_that_keeps_it(tmp_path: Path) -> None:
    model, base = vit(), vit()
    planned = inject(model, RandLoRAConfig(rank=4, target_modules=["qkv", "fc2"]))
    randomize(model)
    report = export_lora(model, tmp_path / "lora.safetensors", energy=0.8)
    by_name = {layer.name: layer for layer in report.layers}
    for path, weight in dense_weights(copy.deepcopy(base).double(), model.state_dict(), planned).items():
        values = torch.linalg.svdvals((weight - base.get_parameter(path).double()).detach()).square()
        rank = by_name[path].rank
        assert rank is not None and 1 < rank < 32
        assert values[:rank].sum() >= 0.8 * values.sum() > values[: rank - 1].sum()


def test_what_acts_is_exported(tmp_path: Path) -> None:
    """Scale, several adapters, merged ones, a named one; an update of zeros."""
    model = vit()
    for seed, name in enumerate(("one", "two")):
        inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"], seed=seed), name)
        randomize(model, name, seed)
    set_scale(model, 0.5, "one")

    def product(**options: Any) -> Tensor:
        export_lora(model, tmp_path / "lora.safetensors", energy=1.0, **options)
        file = safetensors.torch.load_file(tmp_path / "lora.safetensors")
        key = "transformer.blocks.0.attn.qkv"
        return file[f"{key}.lora_B.weight"] @ file[f"{key}.lora_A.weight"]

    def delta() -> Tensor:
        layer = model.blocks[0].attn.qkv
        return (layer.weight - base).detach()

    base = vit().blocks[0].attn.qkv.weight
    both = product()
    torch.testing.assert_close(both, delta(), atol=1e-5, rtol=1e-4)
    merge(model, "one")
    set_active(model, ["two"])
    torch.testing.assert_close(product(), both, atol=1e-5, rtol=1e-4)
    two = product(adapter_name="two")
    assert (two - both).abs().max() > 1e-3
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"]), "zero")
    set_active(model, ["zero"])
    report = export_lora(model, tmp_path / "zero.safetensors", energy=0.9, adapter_name="zero")
    assert report.error == 0 and {layer.rank for layer in report.layers} == {1}


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    model = clip()
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    before = snapshot(model)
    export_lora(model, tmp_path / "lora", rank=2, format="peft")
    assert snapshot(model) == before


def test_mistakes_are_named(tmp_path: Path) -> None:
    model, path = vit(), tmp_path / "lora.safetensors"
    with pytest.raises(ValueError, match="has no active adapter; it has no adapters at all"):
        export_lora(model, path, rank=2)
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"], modules_to_save=["head"]))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("rank .of every layer. or energy", {}),
        ("one of the two", dict(rank=2, energy=0.9)),
        ("rank must be an integer of at least 1, got 0", dict(rank=0)),
        ("energy must be a number above 0 and at most 1, got 1.5", dict(energy=1.5)),
        ("format must be one of diffusers, kohya, peft, lycoris, got 'a1111'", dict(rank=2, format="a1111")),
        ("give neither rank nor energy", dict(rank=2, format="lycoris")),
        ("no adapter 'other'; it has: default", dict(rank=2, adapter_name="other")),
        ("cannot hold modules trained in full .modules_to_save: head.weight, head.bias.", dict(rank=2)),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            export_lora(model, path, **options)
    with pytest.raises(ValueError, match="one .safetensors file, got the name"):
        export_lora(model, tmp_path / "lora.bin", rank=2)
    with pytest.raises(ValueError, match="expected a diffusers pipeline, got int"):
        export_lora(3, path, rank=2)
    assert not list(tmp_path.iterdir())


def test_layers_that_a_format_cannot_hold_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    model = clip()
    inject(model, RandLoRAConfig(rank=4, target_modules=["in_proj_weight"]))
    with pytest.raises(
        ValueError, match=r"'diffusers' cannot hold 4 of the adapted layers \(visual.*in_proj_weight: a pa"
    ):
        export_lora(model, path, rank=2)
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3))
    inject(grouped, RandLoRAConfig(rank=4, target_modules="all"))
    with pytest.raises(ValueError, match="0.weight: a grouped convolution; 1.weight: a transposed convolution"):
        export_lora(grouped, path, rank=2)
    assert export_lora(grouped, path, format="lycoris").error == 0
    pipe = PIPELINES["flux"]()
    inject(pipe.text_encoder_2, RandLoRAConfig(rank=4))
    with pytest.raises(ValueError, match="FluxPipeline loads LoRA into transformer, text_encoder only"):
        export_lora(pipe, path, rank=2)
    part = vit()
    inject(part, RandLoRAConfig(rank=4, target_modules=["qkv"], modules_to_save=["head.weight"]))
    with pytest.raises(ValueError, match="whole modules in full, not head.weight alone"):
        export_lora(part, tmp_path / "folder", rank=2, format="peft")


def test_a_refusal_names_the_formats_that_can_be_written(tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
    )  # fmt: skip
    inject(sana, RandLoRAConfig(rank=4, target_modules=["to_q"]))
    with pytest.raises(
        ValueError, match=r"'kohya' cannot hold 2 .*no such layer.*: use the format 'diffusers' or 'peft' or 'lycoris'"
    ):
        export_lora(sana, tmp_path / "lora.safetensors", rank=2, format="kohya")
    model = vit()
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="use the format 'peft', save the merged model"):
        export_lora(model, tmp_path / "lora.safetensors", rank=2)
    unet = PIPELINES["sd15"]().unet
    inject(unet, RandLoRAConfig(rank=4, target_modules=["to_q"]))
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.register_module("to_q_ip", nn.Linear(4, 4))
    inject(unet, RandLoRAConfig(rank=4, target_modules=["to_q_ip"]), "other")
    with pytest.raises(ValueError, match="cannot hold 1 of the adapted layers .*to_q_ip.weight: kohya's tools have no"):
        export_lora(unet, tmp_path / "lora.safetensors", rank=2, format="kohya")


def test_a_model_that_no_key_of_a_file_can_name_is_refused(tmp_path: Path) -> None:
    """diffusers reads both transformers of Wan 2.2 under one name, from two files."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
            ffn_dim=16, num_layers=1, rope_max_seq_len=16,
        )  # fmt: skip

    def pipeline() -> Any:
        return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer(), transformer(), 0.5)

    torch.manual_seed(0)
    pipe = pipeline()
    inject(pipe.transformer_2, RandLoRAConfig(rank=4, target_modules=["to_q"]))
    randomize(pipe.transformer_2)
    for format in ("diffusers", "kohya", "lycoris"):
        size = {} if format == "lycoris" else {"rank": 2}
        with pytest.raises(ValueError, match="no file names transformer_2.*load_into_transformer_2=True"):
            export_lora(pipe, tmp_path / "lora.safetensors", format=format, **size)
    export_lora(pipe.transformer_2, tmp_path / "second.safetensors", energy=1.0)
    loaded = pipeline()
    loaded.load_lora_weights(tmp_path / "second.safetensors", load_into_transformer_2=True)
    path = "blocks.0.attn1.to_q"
    got = loaded.transformer_2.get_submodule(path).get_delta_weight("default_0")
    layer = pipe.transformer_2.get_submodule(path)
    torch.testing.assert_close(got, layer.weight - layer.base_weight(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "lycoris"])
def test_a_lora_around_the_layers_does_not_change_the_file(format: str, tmp_path: Path) -> None:
    model = PIPELINES["sd15"]().unet
    inject(model, RandLoRAConfig(rank=4, target_modules=["to_q", "conv1"]))
    randomize(model)
    name = "lora" if format == "peft" else "lora.safetensors"
    size = {} if format == "lycoris" else {"rank": 2}
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        if folder == "after":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"]), model)
        export_lora(model, tmp_path / folder / name, format=format, **size)
    names = [{file.name: names_in(file) for file in (tmp_path / folder).rglob("*.*") if file.is_file()}
             for folder in ("before", "after")]  # fmt: skip
    assert names[0] == names[1]


def names_in(file: Path) -> object:
    return set(safetensors.torch.load_file(file)) if file.suffix == ".safetensors" else json.loads(file.read_text())


def test_two_layers_with_one_name_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    inject(model, RandLoRAConfig(rank=2, target_modules="all"))
    with pytest.raises(ValueError, match="has one name, 'lycoris_a_b_c', for two of the adapted layers"):
        export_lora(model, tmp_path / "lora.safetensors", format="lycoris")


def test_the_command_line_offers_every_format() -> None:
    assert {name.removeprefix("lora-") for name in CONVERSIONS} - {"randlora"} == set(FORMATS)
