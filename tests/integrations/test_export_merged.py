"""Merged models in their hosts' own formats, loaded while this library cannot be imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, merge, set_active
from randlora_vision.integrations.export.merged import merged_for_saving, save_merged_file, save_merged_folder
from tests.helpers import IMAGES, mlp, randomize, snapshot, vit
from tests.tiny_pipelines import PIPELINES, sample


def test_hosts_load_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"timm": timm_case(tmp_path), "open_clip": open_clip_case(tmp_path), "diffusers": unet_case(tmp_path)}
    for name in [name for name in sys.modules if name.partition(".")[0] == "randlora_vision"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    monkeypatch.chdir(tmp_path)
    for name, (code, expected) in cases.items():
        scope: dict[str, Any] = {"torch": torch, "images": images(32)}
        with torch.no_grad():
            exec(code, scope)
        torch.testing.assert_close(scope["output"], expected, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


def images(size: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


def timm_case(folder: Path) -> tuple[str, Tensor]:
    """Return code that makes `output` from a saved model, and what it must be."""
    import timm

    options = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=7)
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    inject(model, RandLoRAConfig(rank=4, target_modules="all", modules_to_save=["head"]))
    randomize(model)
    nn.init.normal_(model.head.weight)
    save_untouched(model, folder / "timm.safetensors")
    arguments = f"checkpoint_path='timm.safetensors', **{options}"
    code = f"import timm\noutput = timm.create_model('vit_tiny_patch16_224', {arguments}).eval()(images)"
    return code, model(images(32)).detach()


def save_untouched(model: nn.Module, path: Path) -> None:
    before = snapshot(model)
    save_merged_file(model, path)
    assert snapshot(model) == before


def open_clip_case(folder: Path) -> tuple[str, Tensor]:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-merged.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-merged.json")
    model = open_clip.create_model("tiny-merged").eval()
    inject(model, RandLoRAConfig(rank=4, target_modules="all", modules_to_save=["logit_scale"]))
    randomize(model)
    save_untouched(model, folder / "open_clip.safetensors")
    code = (
        "import open_clip\nopen_clip.add_model_config('tiny-merged.json')\n"
        "model = open_clip.create_model('tiny-merged', pretrained='open_clip.safetensors').eval()\n"
        "output = torch.cat(model(images, torch.arange(16).reshape(2, 8))[:2])"
    )
    with torch.no_grad():
        return code, torch.cat(model(images(32), torch.arange(16).reshape(2, 8))[:2])


def unet_case(folder: Path) -> tuple[str, Tensor]:
    unet = PIPELINES["sd15"]().unet
    inject(unet, RandLoRAConfig(rank=4, target_modules="all"))
    randomize(unet)
    save_merged_folder(unet, folder / "unet")
    code = (
        "from diffusers import UNet2DConditionModel\n"
        "model = UNet2DConditionModel.from_pretrained('.', subfolder='unet').eval()\n"
        "x = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)\n"
        "output = model(x, 5, torch.linspace(-1, 1, 96).reshape(1, 3, 32)).sample"
    )
    merge(unet)
    x = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    with torch.no_grad():
        return code, unet.eval()(x, 5, torch.linspace(-1, 1, 96).reshape(1, 3, 32)).sample


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_diffusers_loads_the_folder(kind: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe, base = PIPELINES[kind](), sample(PIPELINES[kind]())
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    for part in (denoiser, pipe.text_encoder):
        inject(part, RandLoRAConfig(rank=4))
        randomize(part)
    adapted = sample(pipe)
    before = [snapshot(part) for part in (denoiser, pipe.text_encoder)]
    save_merged_folder(pipe, tmp_path / "merged")
    assert [snapshot(part) for part in (denoiser, pipe.text_encoder)] == before
    names = {name for file in tmp_path.rglob("*.safetensors") for name in safetensors.torch.load_file(file)}
    assert names and not [name for name in names if "randlora" in name]
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(loaded), adapted, atol=5e-3, rtol=1e-3)
    for part in (denoiser, pipe.text_encoder):
        merge(part)
    torch.testing.assert_close(sample(loaded), sample(pipe), atol=1e-5, rtol=1e-5)
    assert (adapted - base).abs().max() > 0.05


def test_which_adapters_are_merged(tmp_path: Path) -> None:
    """Merges the active adapters or the named one, with its head; merged ones are restored in their order."""
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(IMAGES)
    model = vit().requires_grad_(False)
    for seed, name in enumerate(("a", "b", "c")):
        inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"], seed=seed, modules_to_save=["head"]), name)
        randomize(model, name, seed)
        set_active(model, [name])
        with torch.no_grad():
            model.head.bias.add_(seed + 1)
    merge(model, ["b", "a"])
    before = snapshot(model)
    fresh = vit()

    def saved(adapter_name: str | None) -> Tensor:
        save_merged_file(model, tmp_path / "merged.safetensors", adapter_name)
        assert snapshot(model) == {**before, "tensors": snapshot(model)["tensors"]}
        fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "merged.safetensors"))
        with torch.no_grad():
            return fresh(x)

    with torch.no_grad():
        torch.testing.assert_close(saved(None), model(x), atol=1e-4, rtol=1e-4)
        alone = vit()
        inject(alone, RandLoRAConfig(rank=4, target_modules=["qkv"], seed=1))
        randomize(alone, None, 1)
        alone.head.bias.add_(3)  # the head of b started as a copy of the active one, that of a
        torch.testing.assert_close(saved("b"), alone(x), atol=1e-5, rtol=1e-5)


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    model = mlp()
    model.append(nn.Linear(6, 6))
    model.append(nn.Linear(6, 6))
    model[4].weight = model[3].weight
    inject(model, RandLoRAConfig(rank=2, target_modules=["3"]))
    randomize(model)
    save_merged_file(model, tmp_path / "merged.safetensors")
    file = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    torch.testing.assert_close(file["3.weight"], model[3].weight)
    assert torch.equal(file["3.weight"], file["4.weight"])


def test_mistakes_are_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="this Sequential has no adapters"):
        save_merged_file(model, tmp_path / "merged.safetensors")
    inject(model, RandLoRAConfig(rank=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="one .safetensors file, got the name"):
        save_merged_file(model, tmp_path / "merged.pth")
    with pytest.raises(ValueError, match="no adapter 'other'; this model has: default"):
        save_merged_file(model, tmp_path / "merged.safetensors", "other")
    with torch.no_grad():
        model[0].weight_randlora_lambda_default.fill_(torch.inf)
    with pytest.raises(ValueError, match="0.weight gives non-finite numbers"):
        save_merged_file(model, tmp_path / "merged.safetensors")
    nn.init.zeros_(model[0].weight_randlora_lambda_default)
    with pytest.raises(RuntimeError, match="disk full"), merged_for_saving(model):
        raise RuntimeError("disk full")
    assert not list(tmp_path.iterdir())
    after = snapshot(model)
    assert after["bytes"] == before["bytes"] and after["types"] == before["types"]
    pipe = PIPELINES["flux"]()
    inject(pipe.transformer, RandLoRAConfig(rank=4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        save_merged_folder(pipe, tmp_path / "full")
