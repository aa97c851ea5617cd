"""Stable Diffusion in ComfyUI itself, where its folder and what it imports are on PYTHONPATH; skipped elsewhere.

Its own U-Nets and text encoders get the weights of diffusers' by its own table of names, and must answer as the adapted
pipeline does once the node has patched them. The names of one layer of every kind of Stable Diffusion XL are kept in
tests/golden/comfyui_names.json, with which tests/integrations/test_comfyui.py tries the node everywhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

arguments: Any = pytest.importorskip("comfy.cli_args")
arguments.args.cpu = True  # read by the imports below

from randlora_vision import set_scale  # noqa: E402
from randlora_vision.integrations import comfyui  # noqa: E402
from randlora_vision.integrations.diffusers import save_adapter  # noqa: E402
from tests import tiny_pipelines  # noqa: E402
from tests.integrations.test_comfyui import NAMES, adapted_pipeline, with_wide_unet  # noqa: E402

clip_model: Any = pytest.importorskip("comfy.clip_model")
operations: Any = pytest.importorskip("comfy.ops")
supported: Any = pytest.importorskip("comfy.supported_models")
patching: Any = pytest.importorskip("comfy.model_patcher")
lora: Any = pytest.importorskip("comfy.lora")
utils: Any = pytest.importorskip("comfy.utils")

CPU = torch.device("cpu")
VOCABULARY = 49408  # of ComfyUI's text encoders
COMMON = dict(image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], legacy=False,
              channel_mult=[1, 2], use_spatial_transformer=True, use_temporal_attention=False)  # fmt: skip
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", dict(COMMON, context_dim=32, transformer_depth=[1, 0], transformer_depth_middle=1,
                          transformer_depth_output=[1, 1, 0, 0], use_linear_in_transformer=False)),
    "sdxl": ("SDXL", dict(COMMON, context_dim=64, transformer_depth=[0, 2], transformer_depth_middle=2,
                          transformer_depth_output=[0, 0, 2, 2], use_linear_in_transformer=True,
                          adm_in_channels=80, num_classes="sequential")),
}  # fmt: skip


class Clip:
    """ComfyUI's object for text encoders, as far as the node uses it."""

    def __init__(self, patcher: Any) -> None:
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())

    def add_patches(self, *given: Any) -> None:
        self.patcher.add_patches(*given)


def patcher(model: nn.Module) -> Any:
    return patching.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def apply(patched: Any) -> nn.Module:
    """The model with the patches in its weights."""
    for key in patched.patches:
        patched.patch_weight_to_device(key, device_to=CPU)
    return patched.model


def unet_of(name: str, base: nn.Module) -> nn.Module:
    kind, options = UNETS[name]
    config = getattr(supported, kind)({**options, "transformer_depth": list(options["transformer_depth"])})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    places, weights = utils.unet_to_diffusers(options), base.state_dict()
    loaded = {places[key]: weight for key, weight in weights.items()}
    model.diffusion_model.load_state_dict(loaded)
    return model


def texts_of(pipe: Any) -> nn.Module:
    """The text encoders in ComfyUI's class, under its names."""
    found = nn.Module()
    for name, own in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        if (base := getattr(pipe, name, None)) is not None:
            made = clip_model.CLIPTextModel(base.config.to_dict(), torch.float32, CPU, operations.manual_cast)
            inner = {key.removeprefix("text_model."): weight for key, weight in base.state_dict().items()}
            inner = {key: weight for key, weight in inner.items() if "position_ids" not in key}
            made.text_projection.weight.data.copy_(inner.pop("text_projection.weight", torch.eye(32)))
            made.text_model.load_state_dict(inner)
            holder = nn.Module()
            holder.transformer = made
            setattr(found, own, holder)
    return found


def answers(name: str, unet: Any, texts: list[Any], ours: bool) -> list[Tensor]:
    """What a U-Net and text encoders answer to fixed inputs."""
    torch.manual_seed(3)
    x, t, context = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([3.0, 900.0]),
        torch.randn(2, 5, 32 * (1 + (name == "sdxl"))),
    )
    pooled, ids = torch.randn(2, 32), torch.rand(2, 6) * 100
    tokens = torch.randint(0, 900, (2, 77))
    if ours:
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}} if name == "sdxl" else {}
        found = [unet(x, t, context, **added).sample]
        return found + [text(tokens).last_hidden_state for text in texts]
    from diffusers.models.embeddings import Timesteps

    times = Timesteps(8, True, 0)(ids.flatten()).view(2, -1)
    given = {"y": torch.cat([pooled, times], dim=1)} if name == "sdxl" else {}
    return [unet(x, t, context, **given)] + [text(tokens)[0] for text in texts]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
@torch.no_grad()
def test_stable_diffusion_answers_as_the_adapted_pipeline(
    name: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = with_wide_unet(name)
    pipe.text_encoder = tiny_pipelines.clip_text(context=77, vocabulary=VOCABULARY)
    if name == "sdxl":
        pipe.text_encoder_2 = tiny_pipelines.clip_text(projected=True, context=77, vocabulary=VOCABULARY)
    parts = ["text_encoder", "text_encoder_2"][: 1 + (name == "sdxl")]
    model, clip = patcher(unet_of(name, pipe.unet)), Clip(patcher(texts_of(pipe)))
    of_text = lambda model: [holder.transformer for holder in model.children()]  # noqa: E731
    before = answers(name, pipe.unet, [getattr(pipe, part) for part in parts], ours=True)
    found = answers(name, model.model.diffusion_model, of_text(clip.cond_stage_model), ours=False)
    for one, other in zip(found, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    layers = adapted_pipeline(pipe)
    save_adapter(pipe, tmp_path / "adapter.safetensors")
    for part in layers:
        set_scale(getattr(pipe, part), strength)
    after = answers(name, pipe.unet, [getattr(pipe, part) for part in parts], ours=True)
    folders: Any = ModuleType("folder_paths")
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    patched, text = comfyui.LoadRandLoRA().load(model, "adapter.safetensors", strength, strength, clip)
    assert len(patched.patches) == len(layers["unet"])
    assert len(text.patcher.patches) == sum(len(layers[part]) for part in parts)
    unet, encoders = apply(patched), apply(text.patcher)
    found = answers(name, unet.diffusion_model, of_text(encoders), ours=False)
    for one, other, base in zip(found, after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.std()))
        assert (one - base).abs().max() > 0.05 * base.std()

    known = {"unet": lora.model_lora_keys_unet(unet, {})}
    known |= dict.fromkeys(parts, lora.model_lora_keys_clip(encoders, {}))
    for part, stored in json.loads(NAMES.read_text()).items() if name == "sdxl" else ():
        for layer, (first, key) in stored.items():
            assert known[part][first] == key and layer in layers[part]
            assert next(other for other in comfyui._names(part, layer) if other in known[part]) == first
