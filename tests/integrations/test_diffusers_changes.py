"""Pipelines that change after an adapter was added: the images of plain pipelines, or an error that says what happened.

The truth is the plain pipeline with the dense updates added, changed in the same way.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, plan, remove
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize
from tests.pipeline_helpers import adapt, deltas, denoiser, difference, few_targets, plain
from tests.tiny_pipelines import CLIP_WIDTH, CONTEXT, PIPELINES, PIXELS, sample

CLOSE = 2e-3
IMAGE_WIDTH = 8


def image_embeds() -> dict[str, list[Tensor]]:
    values = torch.linspace(-1, 1, IMAGE_WIDTH).view(1, 1, IMAGE_WIDTH)
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(values), values])]}


def load_ip_adapter(pipe: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    attentions = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for number, name in enumerate(attentions):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(width, CLIP_WIDTH, generator=generator) * 0.3
            layers[f"{2 * number + 1}.{part}.weight"] = weight
    tokens = 4 * CLIP_WIDTH
    projection = {
        "proj.weight": torch.randn(tokens, IMAGE_WIDTH, generator=generator),
        "proj.bias": torch.zeros(tokens),
        "norm.weight": torch.ones(CLIP_WIDTH),
        "norm.bias": torch.zeros(CLIP_WIDTH),
    }
    state = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)


def both(change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """An adapted pipeline and the plain one with its weights, changed in the same way."""
    pipe = PIPELINES["sd15"]()
    truth = plain("sd15", deltas(pipe, adapt(pipe)))
    for each in (pipe, truth):
        change(each)
    return pipe, truth


def test_an_ip_adapter_comes_and_goes(tmp_path: Path) -> None:
    pipe, truth = both(load_ip_adapter)
    seen = sample(pipe, **image_embeds())
    assert difference(seen, sample(truth, **image_embeds())) < CLOSE
    first = integration.save_adapter(pipe, tmp_path / "with.safetensors")
    for each in (pipe, truth):
        each.unload_ip_adapter()
    assert difference(sample(pipe), sample(truth)) < CLOSE < difference(sample(pipe), seen)
    assert integration.save_adapter(pipe, tmp_path / "without.safetensors").read_bytes() == first.read_bytes()
    integration.fuse(pipe)
    assert difference(sample(pipe), sample(truth)) < CLOSE


def test_adapted_layers_of_an_ip_adapter_go_with_it(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    load_ip_adapter(pipe)
    inject(pipe.unet, RandLoRAConfig(rank=4, target_modules=["to_q", "to_k_ip.0", "image_embeds"]))
    randomize(pipe.unet)
    sample(pipe, **image_embeds())
    merge(pipe.unet)
    weights = {path: weight.clone() for path, weight in pipe.unet.state_dict().items() if path.endswith("to_q.weight")}
    integration.unfuse(pipe)
    pipe.unload_ip_adapter()
    truth = PIPELINES["sd15"]()
    truth.unet.load_state_dict({**truth.unet.state_dict(), **weights})
    assert difference(sample(pipe), sample(truth)) < CLOSE
    with pytest.warns(UserWarning, match="to_k_ip.0.* removed .*; the other 8 targets are saved"):
        file = integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    with integration.disabled(pipe):
        assert torch.equal(sample(pipe), sample(PIPELINES["sd15"]()))
    load_ip_adapter(pipe, seed=1)
    with pytest.raises(ValueError, match="image_embeds.* replaced .*; now, call delete_adapter"):
        sample(pipe, **image_embeds())
    integration.delete_adapter(pipe, "default")
    sample(pipe, **image_embeds())
    assert file.exists()


def test_unused_projections_are_named_in_wrappers_too() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    attention = Attention(8, heads=2, dim_head=4)
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    model = nn.Sequential(nn.Sequential(attention))
    inject(model, RandLoRAConfig(rank=2, target_modules=["to_qkv"]))
    model[0] = checkpoint_wrapper(model[0])
    attention.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="adapters of 0.0.to_qkv have no effect: the attention processor"):
        merge(model)


UNFUSED = {"sd15": "have no effect: the attention processor", "flux": "to_qkv.* removed from the model or replaced"}


@pytest.mark.parametrize("family", UNFUSED)
def test_unfusing_adapted_projections_is_named_at_the_next_call(family: str, tmp_path: Path) -> None:
    pipe, fresh = PIPELINES[family](), sample(PIPELINES[family]())
    model: Any = denoiser(pipe)
    model.fuse_qkv_projections()
    inject(model, RandLoRAConfig(rank=4, target_modules=["to_qkv", "to_out.0"]))
    randomize(model)
    image = sample(pipe)
    model.unfuse_qkv_projections()
    for call in (lambda: sample(pipe), lambda: integration.fuse(pipe)):
        with pytest.raises(ValueError, match=f"{UNFUSED[family]}.*call delete_adapter"):
            call()
    if family == "flux":
        with pytest.warns(UserWarning, match="to_qkv"):
            integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    else:
        integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
        from diffusers.models.attention_processor import FusedAttnProcessor2_0

        former = model.attn_processors
        model.set_attn_processor(FusedAttnProcessor2_0())
        assert torch.equal(sample(pipe), image)
        model.set_attn_processor(former)
    integration.delete_adapter(pipe, "default")
    assert difference(sample(pipe), fresh) < CLOSE


def set_custom_diffusion(pipe: Any) -> None:
    """As diffusers' training script for Custom Diffusion: keys and values of the processors are copied by name."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    state, processors = pipe.unet.state_dict(), {}
    for name in pipe.unet.attn_processors:
        path = name.removesuffix(".processor")
        crossing = path.endswith("attn2")
        width = pipe.unet.get_submodule(path).inner_dim
        own = CustomDiffusionAttnProcessor2_0(crossing, False, width, CLIP_WIDTH if crossing else None)
        if crossing:
            own.load_state_dict(
                {f"{part}_custom_diffusion.weight": state[f"{path}.{part}.weight"] for part in ("to_k", "to_v")}
            )
        processors[name] = own
    pipe.unet.set_attn_processor(processors)


def test_processors_of_custom_diffusion_take_the_place_of_adapted_layers() -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe, text=False)
    image = sample(pipe)
    set_custom_diffusion(pipe)
    with pytest.raises(ValueError, match=r"attn2.to_[kv]\b.* have no effect: .*merge the adapters first"):
        sample(pipe)
    fused = PIPELINES["sd15"]()
    adapt(fused, text=False)
    integration.fuse(fused)
    set_custom_diffusion(fused)
    assert difference(sample(fused), image) < CLOSE
    before = PIPELINES["sd15"]()
    set_custom_diffusion(before)
    names = {t.name for t in plan(before.unet, RandLoRAConfig(rank=4, target_modules="diffusers:attention")).targets}
    assert any(name.endswith("attn1.to_k") for name in names) and not any(name.endswith("attn2.to_k") for name in names)


def control_lora(transformer: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"x_embedder": (2 * transformer.x_embedder.in_features, 32), "transformer_blocks.0.attn.to_q": (32, 32)}
    state = {}
    for path, (inputs, outputs) in sizes.items():
        state[f"transformer.{path}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * 0.1
        state[f"transformer.{path}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * 0.1
    return state


def as_control(pipe: Any) -> Any:
    from diffusers import FluxControlPipeline

    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    control = FluxControlPipeline(**{name: pipe.components[name] for name in parts})
    control.set_progress_bar_config(disable=True)
    control.load_lora_weights(control_lora(pipe.transformer))
    return control


@torch.no_grad()
def controlled(control: Any) -> Tensor:
    picture = torch.linspace(0, 1, 3 * PIXELS * PIXELS).view(1, 3, PIXELS, PIXELS)
    size = dict(height=PIXELS, width=PIXELS, num_inference_steps=2, max_sequence_length=CONTEXT)
    generator = torch.Generator().manual_seed(0)
    return control("a photo", control_image=picture, generator=generator, output_type="pt", **size).images[0]


def test_a_control_lora_expands_the_embedder_of_pixels(tmp_path: Path) -> None:
    pipe = PIPELINES["flux"]()
    truth = plain("flux", deltas(pipe, adapt(pipe)))
    control = as_control(pipe)
    image = controlled(control)
    assert difference(image, controlled(as_control(truth))) < CLOSE
    integration.fuse(control)
    assert difference(controlled(control), image) < CLOSE
    pipe = PIPELINES["flux"]()
    inject(pipe.transformer, RandLoRAConfig(rank=4, target_modules=["x_embedder", "to_q"]))
    control = as_control(pipe)
    for call in (lambda: controlled(control), lambda: integration.fuse(control)):
        with pytest.raises(ValueError, match="x_embedder: .*Control LoRA.*what replaced them may hold copies"):
            call()
    with pytest.warns(UserWarning, match="x_embedder: .*the other 2 targets are saved"):
        integration.save_adapter(control, tmp_path / "adapter.safetensors")
    integration.delete_adapter(control, "default")
    controlled(control)


def test_a_control_lora_expands_a_merged_embedder() -> None:
    pipe = PIPELINES["flux"]()
    inject(pipe.transformer, RandLoRAConfig(rank=4, target_modules=["x_embedder", "to_q"]))
    randomize(pipe.transformer)
    merge(pipe.transformer)
    truth = PIPELINES["flux"]()
    truth.transformer.load_state_dict(pipe.transformer.state_dict())
    control = as_control(pipe)
    expected = controlled(as_control(truth))
    assert difference(controlled(control), expected) < CLOSE
    for undo in (lambda: integration.unfuse(control), integration.disabled(control).__enter__):
        with pytest.raises(ValueError, match="x_embedder: .*replaced"):
            undo()
    remove(pipe.transformer)
    assert difference(controlled(control), expected) < CLOSE


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)


def textual_inversion(pipe: Any) -> None:
    pipe.load_textual_inversion({"<new>": torch.linspace(-1, 1, CLIP_WIDTH)})


@pytest.mark.parametrize(("change", "prompt"), [(freeu, "a photo"), (textual_inversion, "a photo of <new>")])
def test_changes_around_the_adapted_weights(change: Any, prompt: str, tmp_path: Path) -> None:
    pipe, truth = both(change)
    assert difference(sample(pipe, prompt), sample(truth, prompt)) < CLOSE
    file = integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    other = PIPELINES["sd15"]()
    change(other)
    integration.load_adapter(other, file)
    assert torch.equal(sample(other, prompt), sample(pipe, prompt))


def test_an_embedding_trained_in_full_that_a_textual_inversion_resizes(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    inject(
        pipe.text_encoder, RandLoRAConfig(rank=4, target_modules="diffusers:text", modules_to_save=["token_embedding"])
    )
    before = sample(pipe)
    textual_inversion(pipe)
    with pytest.raises(
        ValueError, match=r"token_embedding.weight.* is now \(1515, .*load_textual_inversion.*undo that"
    ):
        integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    pipe.unload_textual_inversion()
    assert torch.equal(sample(pipe), before)
    integration.save_adapter(pipe, tmp_path / "adapter.safetensors")


@pytest.mark.slow
def test_compiled_blocks() -> None:
    pipe = PIPELINES["flux"]()
    few_targets(pipe.transformer, "to_q", "to_out.0", "proj_mlp")
    image = sample(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(sample(pipe), image)  # compiled code rounds otherwise
    off = sample(pipe, joint_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, sample(PIPELINES["flux"]()))
    torch.testing.assert_close(sample(pipe), image)


def test_a_block_that_is_pruned(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3"]()
    inject(pipe.transformer, RandLoRAConfig(rank=4, target_modules=["to_q"]))
    del pipe.transformer.transformer_blocks[0]
    sample(pipe)
    with pytest.warns(UserWarning, match="the other 1 targets are saved"):
        integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    assert len(list(adapter_parameters(pipe.transformer))) == 2
