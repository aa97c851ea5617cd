"""This package's LoRA: PEFT's numbers where PEFT is right, and a gradient where PEFT has none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, plan
from randlora_vision.training.methods.lora import (
    inject_lora,
    load_lora,
    save_lora,
)
from tests.helpers import clip, mlp

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def clip_targets(model: nn.Module) -> list[str]:
    return [target.name for target in plan(model, RandLoRAConfig(rank=1, target_modules="open_clip:both")).targets]


def randomize(added: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        for part in added.values():
            for parameter in part.parameters():
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("factory", [mlp, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))])
def test_it_is_pefts_where_peft_is_right(factory) -> None:
    from peft import LoraConfig, get_peft_model

    base = factory()
    targets = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    x = torch.randn(5, 8) if isinstance(base[0], nn.Linear) else torch.randn(5, 3, 3, 3)
    ours = copy.deepcopy(base)
    added = inject_lora(ours, targets, rank=3, alpha=6.0)
    randomize(added)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets)).base_model.model
    with torch.no_grad():
        for target, part in added.items():
            layer = theirs.get_submodule(target)
            layer.lora_A["default"].weight.copy_(part.down.view_as(layer.lora_A["default"].weight))
            layer.lora_B["default"].weight.copy_(part.up.view_as(layer.lora_B["default"].weight))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for target, part in added.items():
        layer = theirs.get_submodule(target)
        for mine, other in ((part.down, layer.lora_A), (part.up, layer.lora_B)):
            grad = other["default"].weight.grad
            torch.testing.assert_close(mine.grad, grad.view_as(mine), rtol=1e-4, atol=1e-4)


def test_every_target_of_open_clip_gets_a_gradient_and_pefts_out_proj_does_not() -> None:
    from peft import LoraConfig, get_peft_model

    base = clip()
    texts = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0], [1, 6, 7, 31, 0, 0, 0, 0]])
    ours = copy.deepcopy(base)
    added = inject_lora(ours, clip_targets(ours), rank=2, alpha=4.0)
    randomize(added)
    image, text, _ = ours(IMAGES, texts)
    (image @ text.T).square().sum().backward()
    for target, part in added.items():
        assert part.up.grad is not None and part.up.grad.any(), target
        assert part.down.grad is not None and part.down.grad.any(), target

    theirs = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    image, text, _ = theirs(IMAGES, texts)
    (image @ text.T).square().sum().backward()
    names = dict(theirs.named_parameters())
    lost = [name for name, p in names.items() if "lora_B" in name and (p.grad is None or not p.grad.any())]
    assert {name.split(".lora_B")[0].rpartition(".")[2] for name in lost} == {"out_proj"}
    assert not any("in_proj" in name and "lora" in name for name in names)


def test_the_start_is_the_base_and_the_base_is_frozen() -> None:
    model = clip()
    with torch.no_grad():
        before = model.encode_image(IMAGES)
    added = inject_lora(model, clip_targets(model), rank=2, alpha=4.0)
    with torch.no_grad():
        assert torch.equal(model.encode_image(IMAGES), before)
    trained = {id(p) for part in added.values() for p in part.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    model, fresh = clip(), clip()
    added = inject_lora(model, clip_targets(model), rank=2, alpha=5.0)
    randomize(added)
    save_lora(added, tmp_path / "lora.safetensors", rank=2, alpha=5.0)
    load_lora(fresh, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(IMAGES), model.encode_image(IMAGES))
        assert not torch.equal(fresh.encode_image(IMAGES), clip().encode_image(IMAGES))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    numbers = sum(p.numel() for part in added.values() for p in part.parameters())
    assert (tmp_path / "lora.safetensors").stat().st_size < 4 * numbers + 16_384


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA file"):
        load_lora(clip(), tmp_path / "other.safetensors")


def test_mistakes_leave_the_model_alone() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="LoRA rank 7 is above the smaller side of 2, 6"):
        inject_lora(model, ["0", "2"], rank=7, alpha=1.0)
    with pytest.raises(ValueError, match="has no weight 'missing.layer'"):
        inject_lora(model, ["0", "missing.layer"], rank=1, alpha=1.0)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


BROKEN = {
    "no targets": ({"targets": None}, "it lacks targets"),
    "targets of another type": ({"targets": "true"}, "targets must be a list, got true or false"),
    "a target of another type": ({"targets": '["0", 2]'}, r"targets\[1\] must be a string, got an integer"),
    "a missing target": ({"targets": '["0", "9"]'}, "has no weight '9'"),
    "a fractional rank": ({"rank": "2.5"}, "rank must be an integer, got a number"),
    "an absurd rank": ({"rank": "1000000000000"}, "does not hold LoRA tensors of rank 1000000000000"),
    "a negative rank": ({"rank": "-2"}, "does not hold LoRA tensors of rank -2"),
    "alpha in words": ({"alpha": "two"}, "is not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    changes, message = BROKEN[case]
    path, model = tmp_path / "lora.safetensors", mlp()
    save_lora(inject_lora(model, ["0", "2"], 2, 4.0), path, 2, 4.0)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = {**file.metadata(), **changes}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    fresh = mlp()
    with pytest.raises(ValueError, match=message):
        load_lora(fresh, path)
    assert list(fresh.state_dict()) == list(mlp().state_dict())
