"""State dicts as other libraries read them: to save a model, to make another one from it, for checkpoints."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from randlora_vision import RandLoRAConfig, disabled, inject, merge, set_active
from randlora_vision.integrations import diffusers as integration
from tests.helpers import clip, mlp, randomize
from tests.pipeline_helpers import adapt, deltas, difference, plain
from tests.tiny_pipelines import PIPELINES, sample


def names_in(folder: Path) -> set[str]:
    """Names of the tensors in the safetensors files of a folder."""
    found: set[str] = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    return found


def hub_model() -> nn.Module:
    from huggingface_hub import PyTorchModelHubMixin

    class Mixed(nn.Sequential, PyTorchModelHubMixin):
        pass

    return Mixed(nn.Linear(8, 8))


def timm_model() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)


def timm_save(model: Any, folder: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=True)


def open_clip_save(model: Any, folder: Path) -> None:
    from open_clip.push_to_hf_hub import save_for_hf

    class Tokenizer:
        def save_pretrained(self, folder: Any) -> None: ...

    model.visual.image_mean = model.visual.image_std = (0.5,) * 3
    model.visual.preprocess_cfg = {}
    save_for_hf(model, Tokenizer(), {"embed_dim": 16}, str(folder), safe_serialization=True)


def safetensors_save(model: Any, folder: Path) -> None:
    import safetensors.torch

    folder.mkdir(exist_ok=True)
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def hub_save(model: Any, folder: Path) -> None:
    import huggingface_hub

    folder.mkdir(exist_ok=True)
    huggingface_hub.save_torch_model(model, folder)


def accelerate_save(model: Any, folder: Path) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, folder)


def own_save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


SAVERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], None]]] = {
    "diffusers": (lambda: PIPELINES["sd15"]().unet, own_save),
    "transformers": (lambda: PIPELINES["sd15"]().text_encoder, own_save),
    "huggingface_hub": (hub_model, own_save),
    "huggingface_hub, a function": (mlp, hub_save),
    "timm": (timm_model, timm_save),
    "open_clip": (clip, open_clip_save),
    "safetensors": (mlp, safetensors_save),
    "accelerate": (mlp, accelerate_save),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_library_that_saves_a_model_says_that_adapters_are_left_out(kind: str, tmp_path: Path) -> None:
    make, save = SAVERS[kind]
    model = make()
    save(model, tmp_path / "base")
    base = names_in(tmp_path / "base")
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    message = f"of {kind.partition(',')[0]} writes the adapters default beside .*save_adapter"
    with pytest.warns(UserWarning, match=message) as caught:
        save(model, tmp_path / "attached")
    assert [warning.filename for warning in caught] == [__file__]
    assert names_in(tmp_path / "attached") > base
    for ready in (lambda: set_active(model, []), lambda: (set_active(model, "default"), merge(model))):
        ready()
        save(model, tmp_path / "again")  # warnings are errors
    assert names_in(tmp_path / "again") == base


def test_saving_a_part_of_an_adapted_model_says_the_same(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(part, image_size=8, patch_size=4)
    model: Any = CLIPModel(CLIPConfig(text_config=part, vision_config=vision, projection_dim=8))
    inject(model, RandLoRAConfig(rank=4))
    inject(model, RandLoRAConfig(rank=4), "idle")
    set_active(model, "default")
    with pytest.warns(UserWarning, match="writes the adapters default beside") as caught:
        model.vision_model.save_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_saved_pipeline_is_the_base_and_says_so_and_a_fused_one_is_adapted(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def loaded(name: str) -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return sample(pipe)

    pipe = PIPELINES["sd15"]()
    base = sample(pipe)
    adapt(pipe)
    image = sample(pipe)
    with pytest.warns(UserWarning, match="save_pretrained of diffusers writes") as caught:
        pipe.save_pretrained(tmp_path / "attached")
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}  # the UNet, the text encoder
    assert difference(loaded("attached"), base) < 2e-3 < difference(image, base)
    integration.fuse(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    assert not any("randlora" in name for name in names_in(tmp_path / "fused"))
    assert difference(loaded("fused"), image) < 2e-3
    integration.unfuse(pipe)
    assert torch.equal(sample(pipe), image)


def hunyuan() -> Any:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=24, cross_attention_dim_t5=32, text_len=5, text_len_t5=6,
    )  # fmt: skip


def motion(unet: Any) -> Any:
    from diffusers import UNetMotionModel

    return UNetMotionModel.from_unet2d(unet)


def control(model: Any) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(16,))


def control_flux(model: Any) -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel.from_transformer(model, 1, 1, attention_head_dim=16, num_attention_heads=2)


def control_sd3(model: Any) -> Any:
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel.from_transformer(model, num_layers=1)


def control_hunyuan(model: Any) -> Any:
    from diffusers import HunyuanDiT2DControlNetModel

    return HunyuanDiT2DControlNetModel.from_transformer(model, transformer_num_layers=2)


MADE_FROM: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "ControlNetModel.from_unet": (lambda: PIPELINES["sd15"]().unet, control),
    "UNetMotionModel.from_unet2d": (lambda: PIPELINES["sd15"]().unet, motion),
    "FluxControlNetModel.from_transformer": (lambda: PIPELINES["flux"]().transformer, control_flux),
    "SD3ControlNetModel.from_transformer": (lambda: PIPELINES["sd3"]().transformer, control_sd3),
    "HunyuanDiT2DControlNetModel.from_transformer": (hunyuan, control_hunyuan),
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("call", MADE_FROM)
def test_a_model_made_from_an_adapted_one_is_made_from_what_was_chosen(call: str) -> None:
    make, from_model = MADE_FROM[call]
    base = make()
    model = make()
    model.load_state_dict(base.state_dict())
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    with pytest.raises(RuntimeError, match=f"{call} copies the weights .* without its adapters: .*merge"):
        from_model(model)
    with disabled(model):
        from_disabled = from_model(model)
    assert shared(from_disabled, base, base) > 0
    merge(model)
    adapted = shared(from_model(model), model, base)
    assert adapted < shared(from_disabled, base, base)


def shared(made: nn.Module, source: nn.Module, base: nn.Module) -> int:
    """Number of the weights that `made` and `base` share, after a check that `made` copied them from `source`."""
    copied, from_source, from_base = made.state_dict(), source.state_dict(), base.state_dict()
    assert not any("randlora" in name for name in copied)
    names = [name for name, value in copied.items() if name in from_base and value.shape == from_base[name].shape]
    for name in names:
        if name.startswith(("down_blocks", "mid_block", "transformer_blocks", "blocks")):
            assert torch.equal(copied[name], from_source[name]), name
    return sum(torch.equal(copied[name], from_base[name]) for name in names)


def test_checkpoints_of_training_are_whole_and_silent(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = mlp()
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    accelerator = Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!.*randlora)", DeprecationWarning)
        accelerator.save_state(str(tmp_path / "state"))
    randomize(model, seed=1)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
    assert any("randlora_lambda" in name for name in before)


def test_a_sample_of_a_motion_model_from_a_fused_pipeline() -> None:
    """AnimateDiff makes its UNet from that of an image pipeline: the frames are those of the merged weights."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    def frames(pipe: Any) -> torch.Tensor:
        torch.manual_seed(0)
        adapter = MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=2, motion_norm_num_groups=8, motion_max_seq_length=4,
        )  # fmt: skip
        parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        animate = AnimateDiffPipeline(**parts, motion_adapter=adapter)
        animate.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        size = dict(num_frames=2, height=16, width=16, num_inference_steps=2)
        with torch.no_grad():
            return animate("a photo of sks digit", generator=generator, output_type="pt", **size).frames

    pipe = PIPELINES["sd15"]()
    reports = adapt(pipe)
    with pytest.raises(RuntimeError, match="UNetMotionModel.from_unet2d copies"):
        frames(pipe)
    truth = frames(plain("sd15", deltas(pipe, reports)))
    assert difference(truth, frames(plain("sd15"))) > 0.05
    integration.fuse(pipe)
    assert difference(frames(pipe), truth) < 2e-3
