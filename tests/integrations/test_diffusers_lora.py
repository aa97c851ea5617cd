"""RandLoRA with diffusers' own LoRA, in both orders, against plain pipelines with the sum of both dense updates.

LoRA wraps and renames layers; this must not affect files, scales or removal.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, plan, remove, set_active
from randlora_vision.integrations import diffusers as integration
from tests.pipeline_helpers import adapt, deltas, denoiser, difference, lora, lora_deltas, plain, scaled
from tests.tiny_pipelines import PIPELINES, sample

CLOSE = 2e-3
EFFECT = 5e-3  # the weakest of the two adapters, in Flux
FAMILIES = ("sd15", "flux")
# Flux fuses only the LoRA of its transformer, but unfuses that of all components.
IGNORED = ("Already unmerged", ".*LoRA.*")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in IGNORED]


class Case:
    """One family's pipeline with both adapters, and the images of plain pipelines with either and both."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        pipe = PIPELINES[family]()
        self.lora: dict[str, Tensor] = lora(pipe)
        theirs = lora_deltas(self.lora)
        ours = deltas(pipe, adapt(pipe))
        self.file = integration.save_adapter(pipe, folder / f"{family}.safetensors")
        self.image = {
            "neither": sample(plain(family)),
            "ours": sample(plain(family, ours)),
            "theirs": sample(plain(family, theirs)),
            "both": sample(plain(family, ours, theirs)),
            "half of ours": sample(plain(family, scaled(ours, 0.5), theirs)),
        }
        for one, image in self.image.items():
            for other in self.image.keys() - {one}:
                assert difference(image, self.image[other]) > EFFECT

    def pipeline(self, order: str) -> Any:
        pipe = PIPELINES[self.family]()
        if order == "LoRA first":
            pipe.load_lora_weights(dict(self.lora))
        integration.load_adapter(pipe, self.file)
        if order == "LoRA last":
            pipe.load_lora_weights(dict(self.lora))
        return pipe

    def check(self, pipe: Any, expected: str) -> None:
        assert difference(sample(pipe), self.image[expected]) < CLOSE


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["LoRA first", "LoRA last"])
def pipe(request: pytest.FixtureRequest, case: Case) -> Any:
    return case.pipeline(request.param)


def test_both_act_and_either_leaves(pipe: Any, case: Case, tmp_path: Path) -> None:
    case.check(pipe, "both")
    integration.set_scales(pipe, 0.5)
    case.check(pipe, "half of ours")
    integration.set_scales(pipe, 1.0)
    with integration.disabled(pipe):
        case.check(pipe, "theirs")
    pipe.disable_lora()
    case.check(pipe, "ours")
    pipe.enable_lora()
    saved = integration.save_adapter(pipe, tmp_path / "again.safetensors")
    assert saved.read_bytes() == case.file.read_bytes()
    integration.delete_adapter(pipe, "default")
    case.check(pipe, "theirs")
    integration.load_adapter(pipe, saved)
    case.check(pipe, "both")
    pipe.unload_lora_weights()
    assert not [name for name, _ in denoiser(pipe).named_modules() if "lora" in name or "base_layer" in name]
    case.check(pipe, "ours")
    assert integration.save_adapter(pipe, tmp_path / "last.safetensors").read_bytes() == case.file.read_bytes()
    integration.delete_adapter(pipe, "default")
    assert torch.equal(sample(pipe), case.image["neither"])


def test_both_are_fused_in_any_order(pipe: Any, case: Case) -> None:
    pipe.fuse_lora()
    case.check(pipe, "both")
    with integration.disabled(pipe):
        case.check(pipe, "theirs")
    integration.fuse(pipe)
    case.check(pipe, "both")
    pipe.unfuse_lora()
    case.check(pipe, "both")
    pipe.disable_lora()
    case.check(pipe, "ours")
    integration.unfuse(pipe)
    case.check(pipe, "ours")
    pipe.enable_lora()
    integration.fuse(pipe)
    pipe.fuse_lora()
    case.check(pipe, "both")
    with integration.disabled(pipe):
        case.check(pipe, "theirs")
    case.check(pipe, "both")
    integration.unfuse(pipe)
    case.check(pipe, "both")
    pipe.unfuse_lora()
    case.check(pipe, "both")
    integration.fuse(pipe)
    pipe.unload_lora_weights()
    case.check(pipe, "ours")
    integration.unfuse(pipe)
    case.check(pipe, "ours")


def test_lora_joins_a_fused_adapter(case: Case) -> None:
    pipe = case.pipeline("without LoRA")
    integration.fuse(pipe)
    pipe.load_lora_weights(dict(case.lora))
    case.check(pipe, "both")
    pipe.unload_lora_weights()
    integration.unfuse(pipe)
    integration.delete_adapter(pipe, "default")
    assert torch.equal(sample(pipe), case.image["neither"])


def test_targets_and_flags_are_those_of_the_plain_model() -> None:
    config = RandLoRAConfig(rank=4, target_modules="diffusers:backbone")
    bare = PIPELINES["sd15"]()
    flags = {name: p.requires_grad for name, p in bare.unet.named_parameters()}
    for target_modules in ("diffusers:conv", "all-linear", "all", ["to_q", "proj_in"], r".*attn1\.to_[qv]"):
        asked = RandLoRAConfig(rank=4, target_modules=target_modules)
        wrapped = PIPELINES["sd15"]()
        wrapped.load_lora_weights(lora(wrapped))
        assert plan(wrapped.unet, asked).targets == plan(bare.unet, asked).targets
    inject(bare.unet, config)
    bare.load_lora_weights(lora(bare))
    bare.unload_lora_weights()
    remove(bare.unet)
    assert {name: p.requires_grad for name, p in bare.unet.named_parameters()} == flags


def test_training_goes_on_beside_a_lora() -> None:
    pipe = PIPELINES["sd15"]()
    inject(pipe.unet, RandLoRAConfig(rank=4, target_modules="diffusers:backbone"))
    pipe.load_lora_weights(lora(pipe))
    set_active(pipe.unet, "default")  # diffusers freezes all parameters except its LoRA
    inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 5, 32))
    pipe.unet(**inputs).sample.square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for _, p in adapter_parameters(pipe.unet))
    lambdas = [p for name, p in adapter_parameters(pipe.unet) if name.endswith("lambda")]
    assert all(p.grad is not None and p.grad.any() for p in lambdas)
