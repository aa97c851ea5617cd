"""The scale that diffusers passes with one call, in the keyword arguments of attention: the same as `set_scales`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_vision import RandLoRAConfig, delete_adapter, inject, merge, remove, set_scale, unmerge
from randlora_vision.integrations import diffusers as integration
from tests.helpers import randomize
from tests.pipeline_helpers import adapt, deltas, difference, lora, lora_deltas, plain, scaled
from tests.tiny_pipelines import PIPELINES, sample
from tests.zoo.from_diffusers import ENTRIES

NAMES = {"sd15": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs"}
INPUTS = dict(sample=torch.ones(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.ones(1, 5, 32))


def scale_of(family: str, scale: float) -> dict[str, Any]:
    return {NAMES.get(family, "joint_attention_kwargs"): {"scale": scale}}


@pytest.fixture
def unet() -> Any:
    unet = PIPELINES["sd15"]().unet
    inject(unet, RandLoRAConfig(rank=4, target_modules="diffusers:backbone"))
    randomize(unet)
    return unet


@torch.no_grad()
def call(unet: Any, **options: Any) -> Tensor:
    return unet(**INPUTS, **options).sample


@pytest.mark.parametrize("family", PIPELINES)
def test_a_scale_for_one_call_is_that_of_set_scales(family: str) -> None:
    """In the denoiser and in the text encoders, whose scale the pipeline takes from the same argument."""
    pipe = PIPELINES[family]()
    base = sample(pipe)
    reports = adapt(pipe)
    image = sample(pipe)
    once = sample(pipe, **scale_of(family, 0.5))
    assert torch.equal(sample(pipe, **scale_of(family, 0.0)), base)
    assert torch.equal(sample(pipe), image) and difference(once, image) > 0.05
    integration.set_scales(pipe, 0.5)
    assert torch.equal(sample(pipe), once)
    assert difference(once, sample(plain(family, scaled(deltas(pipe, reports), 0.5)))) < 2e-3
    # Both factors apply.
    assert torch.equal(sample(pipe, **scale_of(family, 2.0)), image)


def test_a_lora_and_an_adapter_are_scaled_together() -> None:
    pipe = PIPELINES["sd15"]()
    reports, theirs = adapt(pipe), lora(pipe)
    ours = deltas(pipe, reports)
    pipe.load_lora_weights(dict(theirs))
    truth = sample(plain("sd15", scaled(ours, 0.5), scaled(lora_deltas(theirs), 0.5)))
    assert difference(sample(pipe, **scale_of("sd15", 0.5)), truth) < 2e-3
    assert difference(sample(pipe), truth) > 0.05


ATTENTION_KWARGS = ("sana", "cogvideox", "ltx", "lumina2", "qwen_image")


@pytest.mark.parametrize("name", ATTENTION_KWARGS)
def test_transformers_with_attention_kwargs(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == f"diffusers/{name}")
    model = entry.build().requires_grad_(False)
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    hook = model.register_forward_pre_hook(pass_scale, with_kwargs=True, prepend=True)
    once = entry.run(model)
    hook.remove()
    assert not torch.equal(entry.run(model), once)
    set_scale(model, 0.5)
    assert torch.equal(entry.run(model), once)


def pass_scale(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_kwargs": {"scale": 0.5}}


def test_the_scale_ends_with_the_call(unet: Any) -> None:
    full, weight = call(unet), unet.down_blocks[0].attentions[0].proj_in.weight
    with pytest.raises(RuntimeError):  # a latent of five channels
        unet(torch.ones(1, 5, 8, 8), 3, torch.ones(1, 5, 32), cross_attention_kwargs={"scale": 0.25})
    assert torch.equal(unet.down_blocks[0].attentions[0].proj_in.weight, weight)
    call(unet, cross_attention_kwargs={"scale": 0.25})
    assert torch.equal(unet.down_blocks[0].attentions[0].proj_in.weight, weight)
    assert torch.equal(call(unet, cross_attention_kwargs={}), full)


def test_the_argument_of_the_caller_is_not_changed(unet: Any) -> None:
    given = {"scale": 0.5}
    call(unet, cross_attention_kwargs=given)
    assert given == {"scale": 0.5}


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", [0.5]])
def test_only_numbers_are_accepted(unet: Any, scale: Any) -> None:
    with pytest.raises(ValueError, match="must be a finite number, got"):
        call(unet, cross_attention_kwargs={"scale": scale})


def test_gradients_have_the_scale_or_it_is_refused(unet: Any) -> None:
    def gradients(**options: Any) -> list[Tensor]:
        unet.zero_grad()
        unet(**INPUTS, **options).sample.square().sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    once = gradients(cross_attention_kwargs={"scale": 0.5})
    set_scale(unet, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(once, gradients(), strict=True))
    unet.enable_gradient_checkpointing()
    unet.train()
    with pytest.raises(ValueError, match="cannot be used with gradient checkpointing: call .*set_scale"):
        gradients(cross_attention_kwargs={"scale": 0.5})
    assert gradients()


def test_merged_adapters_say_that_they_cannot_be_scaled(unet: Any) -> None:
    merge(unet)
    full = call(unet)
    with pytest.warns(UserWarning, match="scale=0.5 has no effect on the merged adapters default: unmerge them"):
        assert torch.equal(call(unet, cross_attention_kwargs={"scale": 0.5}), full)
    unmerge(unet)
    assert not torch.equal(call(unet, cross_attention_kwargs={"scale": 0.5}), full)


def test_the_hooks_leave_with_the_last_adapter(unet: Any) -> None:
    inject(unet, RandLoRAConfig(rank=4), "second")
    delete_adapter(unet, "default")
    randomize(unet)
    assert not torch.equal(call(unet, cross_attention_kwargs={"scale": 0.5}), call(unet))
    remove(unet)
    assert not unet._forward_pre_hooks and not unet._forward_hooks
    assert not unet._forward_hooks_always_called and not unet._forward_pre_hooks_with_kwargs
