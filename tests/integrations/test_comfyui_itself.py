"""The node in ComfyUI itself, where its folder and what it imports are on PYTHONPATH; skipped elsewhere.

Compared with ComfyUI 0.30.0: its own `ModelPatcher` and `calculate_weight` patch models of its own classes, whose
names for the layers of diffusers' models come from its own `model_lora_keys_unet`. A patched weight must be the merged
weight of diffusers' model, in the place and the order that ComfyUI's conversion tables say (Flux's fused queries, keys
and values; the last modulation, whose halves are swapped). Wan is the one model that ComfyUI knows under no name of
diffusers' layers: the node renames them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

arguments: Any = pytest.importorskip("comfy.cli_args")
arguments.args.cpu = True  # read by the imports below

from randlora_vision import RandLoRAConfig, inject, merge, save_adapter  # noqa: E402
from randlora_vision.integrations import comfyui  # noqa: E402
from tests import tiny_families, tiny_pipelines  # noqa: E402
from tests.helpers import randomize  # noqa: E402

supported: Any = pytest.importorskip("comfy.supported_models")
patching: Any = pytest.importorskip("comfy.model_patcher")
lora: Any = pytest.importorskip("comfy.lora")

# fmt: off
MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "flux": (tiny_pipelines.flux, "Flux", dict(
        image_model="flux", in_channels=4, out_channels=4, vec_in_dim=32, context_in_dim=24, hidden_size=32,
        mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[])),
    "qwen_image": (tiny_families.qwen_image, "QwenImage", dict(
        image_model="qwen_image", in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))),
    "ltx": (tiny_families.ltx, "LTXV", dict(
        image_model="ltxv", in_channels=8, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2,
        caption_channels=24, num_layers=1)),
    "wan": (tiny_families.wan, "WAN21_T2V", dict(
        image_model="wan2.1", model_type="t2v", in_dim=4, out_dim=4, dim=32, ffn_dim=48, freq_dim=16, text_dim=24,
        num_heads=2, num_layers=1)),
}
# fmt: on


def place(known: dict[str, Any], layer: str) -> tuple[str, Any, Any]:
    """Where ComfyUI has a layer: the key, the part of it, and how the part is turned."""
    found = next(known[name] for name in comfyui._names("", layer) if name in known)
    key, offset, turn = (found, None, None) if isinstance(found, str) else (*found, None)[:3]
    return key, offset, turn or (lambda weight: weight)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
@torch.no_grad()
def test_weights_patched_by_comfyui_are_the_merged_ones(
    name: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kind, options = MODELS[name]
    config = getattr(supported, kind)(dict(options))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    for parameter in model.parameters():  # ComfyUI leaves them without values
        torch.nn.init.normal_(parameter)
    base = make().transformer
    target = RandLoRAConfig(rank=4, target_modules="diffusers:backbone")
    before = {path: weight.clone() for path, weight in base.state_dict().items()}
    report = inject(base, target)
    randomize(base, "default", seed=1)
    save_adapter(base, tmp_path / "adapter.safetensors")
    merge(base)
    layers = [target.name for target in report.targets]
    folders: Any = ModuleType("folder_paths")
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)

    known = lora.model_lora_keys_unet(model, {})
    expected = {key: weight.clone() for key, weight in model.state_dict().items()}
    for layer in layers:
        key, offset, turn = place(known, layer)
        part = expected[key] if offset is None else expected[key].narrow(*offset)
        update = base.get_parameter(f"{layer}.weight") - before[f"{layer}.weight"]
        part += strength * turn(update)
    device = torch.device("cpu")
    patcher = patching.ModelPatcher(model, load_device=device, offload_device=device)
    patched, _ = comfyui.LoadRandLoRA().load(patcher, "adapter.safetensors", strength, 1.0)
    assert not patcher.patches and len(patched.patches) == len({place(known, layer)[0] for layer in layers})
    for key in patched.patches:
        found = patched.patch_weight_to_device(key, device_to=device, return_weight=True)
        assert not torch.equal(found, model.state_dict()[key])
        torch.testing.assert_close(found, expected[key], rtol=0, atol=1e-4)
