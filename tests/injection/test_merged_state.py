"""What a merged model is to those that read its parameters and its state dict: a plain model."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    disabled,
    inject,
    merge,
    remove,
    save_adapter,
    set_active,
    unmerge,
)
from tests.helpers import mlp, randomize

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def adapted(*names: str) -> nn.Sequential:
    model = mlp()
    for seed, name in enumerate(names or ("default",)):
        inject(model, RandLoRAConfig(rank=2, seed=seed), name)
        randomize(model, name, seed)
    return model


def objects(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(parameter)) for name, parameter in model.named_parameters()]


def test_a_merged_model_has_the_names_of_the_base() -> None:
    model, plain = adapted(), mlp()
    output = model(X)
    merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(X), output)
    assert len(list(adapter_parameters(model))) == 4


def test_unmerging_brings_the_same_parameters_back_in_their_order() -> None:
    model = adapted("a", "b")
    before, state = objects(model), list(model.state_dict())
    merge(model, "a")
    assert {name.rpartition("_")[2] for name in model.state_dict() if "randlora" in name} == {"b"}
    merge(model, "b")
    assert not any("randlora" in name for name in model.state_dict())
    unmerge(model, "b")
    unmerge(model)
    assert objects(model) == before and list(model.state_dict()) == state


def test_training_goes_on_after_a_merge() -> None:
    model, other = adapted(), adapted()
    parameters = [[p for p in m.parameters() if p.requires_grad] for m in (model, other)]
    merge(model)
    for name, parameter in adapter_parameters(model):
        assert parameter.requires_grad, name
    unmerge(model)
    for each, own in zip((model, other), parameters, strict=True):
        optimizer = torch.optim.SGD(own, lr=0.1)
        each(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(model(X), other(X))


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "meta": lambda model: model.to("meta"),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_the_adapter_of_a_merged_model_is_converted_with_it(kind: str) -> None:
    models = [adapted(), adapted()]
    merge(models[0])
    merged, unmerged = (CONVERSIONS[kind](model) for model in models)
    unmerge(merged)
    for (name, one), (_, other) in zip(merged.named_parameters(), unmerged.named_parameters(), strict=True):
        assert one.dtype == other.dtype and one.device == other.device, name
        assert one.is_meta or torch.equal(one, other), name


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    output, before = model(X), objects(model)
    merge(model)
    assert list(model.state_dict()) == ["0.weight", "1.weight"]
    unmerge(model)
    assert objects(model) == before and torch.equal(model(X), output)
    merge(model)
    model.double().float()
    unmerge(model)
    assert torch.equal(model(X), output)


def test_a_merged_model_is_offloaded_like_a_plain_one() -> None:
    from accelerate import cpu_offload

    model = adapted()
    merge(model)
    output = model(X)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(X), output)


def test_merged_adapters_are_saved_disabled_and_joined(tmp_path: object) -> None:
    model, plain = adapted(), mlp()
    before = save_adapter(model, f"{tmp_path}/before.safetensors").read_bytes()
    merge(model)
    assert save_adapter(model, f"{tmp_path}/after.safetensors").read_bytes() == before
    with disabled(model):
        assert torch.equal(model(X), plain(X))
        assert any("randlora" in name for name in model.state_dict())
    inject(model, RandLoRAConfig(rank=2, seed=7), "second")
    randomize(model, "second", 7)
    unmerge(model)
    both = adapted()
    inject(both, RandLoRAConfig(rank=2, seed=7), "second")
    randomize(both, "second", 7)
    assert torch.equal(model(X), both(X))
    set_active(model, ["default"])
    merge(model)
    remove(model)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_module_that_was_replaced_is_named(tmp_path: object) -> None:
    model = adapted()
    model[0] = nn.Linear(8, 16)
    with pytest.raises(ValueError, match="^0: adapted, but removed from the model or replaced.*delete_adapter"):
        merge(model)
    with pytest.warns(UserWarning, match="^0: adapted, but .*; the other 1 targets are saved") as caught:
        save_adapter(model, f"{tmp_path}/adapter.safetensors")
    assert caught[0].filename == __file__
    model[2] = nn.Linear(16, 6)
    with pytest.raises(ValueError, match="nothing is left of adapter 'default': 0, 2: adapted, but"):
        save_adapter(model, f"{tmp_path}/adapter.safetensors")
    remove(model)
