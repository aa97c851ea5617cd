"""The node of ComfyUI: the library's updates, added as ComfyUI's model patcher asks of its adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, merge, save_adapter
from randlora_vision.files import bundle
from randlora_vision.integrations import comfyui
from randlora_vision.integrations.diffusers import save_adapter as save_pipeline
from tests.adapter_files import opened, rewritten
from tests.golden import make as golden
from tests.helpers import randomize

KINDS = ("uniform", "normal", "sparse", "very_sparse", "structured")
NAMES = Path(__file__).parents[1] / "golden/comfyui_names.json"
"""The last layer of every kind -> the name by which ComfyUI 0.30.0 finds it, and its key of the weight."""


class Block(nn.Module):
    """Layers of both orientations, and a convolution, as in a denoiser of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.ff = nn.Linear(24, 24), nn.Linear(40, 24), nn.Linear(24, 56)
        self.proj = nn.Conv2d(8, 24, 3)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


class Patcher:
    """What ComfyUI's ModelPatcher does with patches: kept per key, applied one after another to the weight."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.model = SimpleNamespace(state_dict=lambda: weights)
        self.cond_stage_model = self.model
        self.patches: dict[str, list[Any]] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model.state_dict())
        other.patches = {key: list(held) for key, held in self.patches.items()}
        return other

    def add_patches(self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> None:
        for place, patch in patches.items():
            key, offset = (place, None) if isinstance(place, str) else place
            assert key in self.model.state_dict()
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, offset))

    def patched(self, key: str) -> Tensor:
        weight = self.model.state_dict()[key].clone()
        for strength, patch, strength_model, offset in self.patches[key]:
            patch = type(patch)(patch.loaded_keys, patch.weights)  # as when it is prefetched
            part = weight if offset is None else weight.narrow(*offset)
            found = patch.calculate_weight(part, key, strength, strength_model, offset, lambda update: update)
            weight = found if offset is None else weight
        return weight


def adapted(path: Path, kind: str, rank: int = 5, **options: Any) -> tuple[Denoiser, dict[str, Tensor], Denoiser]:
    """A model with an adapter that acts, its weights before, and the merged model; the adapter is saved to `path`."""
    torch.manual_seed(0)
    model = Denoiser()
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    config = RandLoRAConfig(rank=rank, target_modules="all", bases=kind, seed=7, **options)  # type: ignore[arg-type]
    inject(model, config)
    randomize(model, "default", seed=1)
    save_adapter(model, path)
    fresh = Denoiser()
    fresh.load_state_dict(before)
    load_adapter(fresh, path)
    merge(fresh)
    return model, before, fresh


def with_wide_unet(name: str) -> Any:
    """A Stable Diffusion (XL) whose U-Net has groups of 32 channels, as ComfyUI's always have."""
    from diffusers import UNet2DConditionModel

    from tests import tiny_pipelines as tiny

    # The numbers of heads are those of ComfyUI: 8, or one for 64 channels.
    sizes, heads = {"sd15": (tiny.SD15, 8), "sdxl": (tiny.SDXL, 1)}[name]
    pipe = getattr(tiny, name)()
    pipe.unet = UNet2DConditionModel(
        **{**sizes, "block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": heads}
    )
    return pipe


def adapted_pipeline(pipe: Any) -> dict[str, list[str]]:
    """Give every part of a pipeline an adapter that acts; component -> its layers."""
    layers = {}
    for number, part in enumerate(name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)):
        preset = "diffusers:text" if number else "diffusers:conv"
        report = inject(getattr(pipe, part), RandLoRAConfig(rank=4 + number, target_modules=preset, seed=number))
        randomize(getattr(pipe, part), "default", seed=number)
        layers[part] = [target.name for target in report.targets]
    return layers


@torch.no_grad()
def test_layers_of_stable_diffusion_have_the_names_that_comfyui_knows(tmp_path: Path) -> None:
    pipe = with_wide_unet("sdxl")
    stored = json.loads(NAMES.read_text())
    before = {part: {layer: weight_of(pipe, part, layer) for layer in some} for part, some in stored.items()}
    adapted_pipeline(pipe)
    save_pipeline(pipe, tmp_path / "adapter.safetensors")
    for part, updates in comfyui.read(str(tmp_path / "adapter.safetensors")).items():
        merge(getattr(pipe, part))
        known = dict(pair for pair in stored[part].values())
        found = comfyui.patches({layer: updates[layer] for layer in stored[part]}, part, known)
        assert set(found) == set(known.values())
        for layer, (_, key) in stored[part].items():
            expected = weight_of(pipe, part, layer)
            patcher = Patcher({key: before[part][layer]})
            patcher.add_patches({key: found[key]})
            torch.testing.assert_close(patcher.patched(key), expected, rtol=0, atol=1e-5)


def weight_of(pipe: Any, part: str, layer: str) -> Tensor:
    return getattr(pipe, part).get_submodule(layer).weight.detach().clone()


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The modules of ComfyUI that the node asks: folders, and the names that its LoRA loader knows."""

    def keys_unet(model: Any, known: dict[str, Any]) -> dict[str, Any]:
        for key in model.state_dict():
            if key.endswith(".weight"):
                known["lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")] = (
                    key
                )
        return known

    def keys_clip(model: Any, known: dict[str, Any]) -> dict[str, Any]:
        return known | {
            f"text_encoder.{key.removeprefix('clip_l.').removesuffix('.weight')}": key for key in model.state_dict()
        }

    folders: Any = ModuleType("folder_paths")
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    folders.get_filename_list = lambda kind: ["adapter.safetensors"]
    lora: Any = ModuleType("comfy.lora")
    lora.model_lora_keys_unet, lora.model_lora_keys_clip = keys_unet, keys_clip
    package: Any = ModuleType("comfy")
    package.lora = lora
    for name, module in (("folder_paths", folders), ("comfy", package), ("comfy.lora", lora)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_patched_weights_are_the_merged_ones(kind: str, strength: float, tmp_path: Path, comfy: None) -> None:
    rank = 5 if kind != "structured" else 6
    options = {"rank_pattern": {"blocks.1.ff": 3}} if kind in ("normal", "structured") else {}
    _, before, merged = adapted(tmp_path / "adapter.safetensors", kind, rank, **options)
    weights = {f"diffusion_model.{name}": weight for name, weight in before.items()}
    model, _ = comfyui.LoadRandLoRA().load(Patcher(weights), "adapter.safetensors", strength, 1.0)
    assert len(model.patches) == 8
    for key in model.patches:
        base, whole = weights[key], merged.state_dict()[key.removeprefix("diffusion_model.")]
        expected = base + strength * (whole - base)
        assert (whole - base).abs().max() > 0.01
        torch.testing.assert_close(model.patched(key), expected, rtol=0, atol=1e-5)


def test_a_part_of_a_fused_weight_is_patched(tmp_path: Path) -> None:
    _, before, merged = adapted(tmp_path / "adapter.safetensors", "uniform")
    (layers,) = comfyui.read(str(tmp_path / "adapter.safetensors")).values()
    layer = "blocks.0.to_q"
    fused = torch.cat([before[f"{layer}.weight"]] * 3)
    patcher = Patcher({"qkv.weight": fused})
    known = {f"transformer.{layer}": ("qkv.weight", (0, 24, 24))}
    patcher.add_patches(comfyui.patches({layer: layers[layer]}, "", known))
    found = patcher.patched("qkv.weight")
    torch.testing.assert_close(found[24:48], merged.state_dict()[f"{layer}.weight"], rtol=0, atol=1e-5)
    assert torch.equal(found[:24], fused[:24]) and torch.equal(found[48:], fused[48:])


def test_a_file_of_a_pipeline_patches_the_clip_too(tmp_path: Path, comfy: None) -> None:
    from tests.pipeline_helpers import adapt, denoiser
    from tests.tiny_pipelines import sd15

    pipe = sd15()
    adapt(pipe)
    save_pipeline(pipe, tmp_path / "adapter.safetensors")
    parts = comfyui.read(str(tmp_path / "adapter.safetensors"))
    assert set(parts) == {"unet", "text_encoder"}
    unet = {f"diffusion_model.{name}.weight": torch.zeros(update.weights[2]) for name, update in parts["unet"].items()}
    clip = {f"clip_l.{name}.weight": torch.zeros(update.weights[2]) for name, update in parts["text_encoder"].items()}
    load = comfyui.LoadRandLoRA().load
    with pytest.raises(ValueError, match="also adapts text_encoder: connect the clip"):
        load(Patcher(unet), "adapter.safetensors", 1.0, 1.0)
    model, text = load(Patcher(unet), "adapter.safetensors", 1.0, 0.5, Patcher(clip))
    base, prefix = denoiser(sd15()), "diffusion_model."
    merge(pipe.unet)
    for key in model.patches:
        name = key.removeprefix(prefix)
        update = pipe.unet.get_parameter(name) - base.get_parameter(name)
        torch.testing.assert_close(model.patched(key).reshape(update.shape), update, rtol=0, atol=1e-5)
    assert len(text.patches) == len(parts["text_encoder"])
    assert comfyui.LoadRandLoRA.INPUT_TYPES()["required"]["adapter"] == (["adapter.safetensors"],)


@pytest.mark.parametrize(("noise", "parts"), [("high", ["transformer"]), ("low", ["transformer_2"])])
def test_a_model_of_two_gets_its_own_part(noise: str, parts: list[str], tmp_path: Path, comfy: None) -> None:
    updates: dict[str, Any] = {}
    for number, name in enumerate(("transformer", "transformer_2")):
        _, before, _ = adapted(tmp_path / f"{name}.safetensors", "uniform", rank=4 + number)
        updates[name] = packed_file(tmp_path / f"{name}.safetensors")
    bundle.write(tmp_path / "both.safetensors", updates)
    model = Patcher({f"diffusion_model.{name}": weight for name, weight in before.items()})
    load = comfyui.LoadRandLoRA().load
    chosen, _ = load(model, "both.safetensors", 1.0, 1.0, noise=noise)
    alone, _ = load(model, f"{parts[0]}.safetensors", 1.0, 1.0, noise=noise)  # a file that names no part
    assert chosen.patches and chosen.patches.keys() == alone.patches.keys()
    assert all(torch.equal(chosen.patched(key), alone.patched(key)) for key in chosen.patches)
    with pytest.raises(ValueError, match="both.safetensors adapts transformer, transformer_2: choose which noise"):
        load(model, "both.safetensors", 1.0, 1.0)
    bundle.write(tmp_path / "one.safetensors", {"transformer_2": updates["transformer_2"]})
    if noise == "high":
        with pytest.raises(ValueError, match="one.safetensors adapts transformer_2: choose which noise"):
            load(model, "one.safetensors", 1.0, 1.0, noise=noise)


def packed_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = opened(path)
    return tensors, {key: metadata[key] for key in ("config", "bases", "targets")}


@pytest.mark.parametrize("name", ["uniform", "very_sparse", "structured", "stored", "all_layers", "bundle"])
def test_every_version_of_the_format_is_read_and_checked(name: str, tmp_path: Path) -> None:
    found = [comfyui.read(str(folder / f"{name}.safetensors")) for folder in (golden.HERE, golden.NEWEST)]
    old, new = [{(part, layer): update for part in file for layer, update in file[part].items()} for file in found]
    assert old.keys() == new.keys() and len(found[0]) == (2 if name == "bundle" else 1)
    assert all(torch.equal(old[key].delta(torch.device("cpu")), new[key].delta(torch.device("cpu"))) for key in old)
    for folder in (golden.HERE, golden.NEWEST):
        data = bytearray((folder / f"{name}.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=f"its {'SHA-256' if folder == golden.HERE else 'CRC-32'} does not match"):
            comfyui.read(str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="not a RandLoRA adapter file of format version 1 to 3"):
        comfyui.read(str(rewritten(tmp_path / "a.safetensors", lambda m, _: m.update(format_version="4"))))


def test_what_cannot_be_loaded_is_named(tmp_path: Path, comfy: None) -> None:
    path = tmp_path / "adapter.safetensors"
    adapted(path, "uniform")
    with pytest.raises(ValueError, match=r"has no layer blocks.0.to_q and 7 others: is it another model\?"):
        comfyui.LoadRandLoRA().load(Patcher({"x.weight": torch.zeros(1)}), path.name, 1.0, 1.0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was altered or damaged"):
        comfyui.read(str(path))
    with pytest.raises(ValueError, match="bases of kind 'peft', which PEFT draws"):
        comfyui.read(str(golden.NEWEST / "peft.safetensors"))
    with pytest.raises(ValueError, match="trained in full"):
        comfyui.read(str(golden.NEWEST / "saved_modules.safetensors"))


def test_the_node_imports_nothing_of_the_library() -> None:
    text = Path(comfyui.__file__).read_text(encoding="utf-8")
    assert "import randlora_vision" not in text and "from randlora_vision" not in text
