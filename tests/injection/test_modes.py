"""Injecting and loading in modes of PyTorch that change what new tensors are: the adapter is the same, and trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, load_adapter, merge, remove, save_adapter
from tests.helpers import mlp, randomize

CONFIG = RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"])
X = torch.linspace(-1, 1, 24).reshape(3, 8)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "bfloat16": default_dtype,
    "meta": lambda: torch.device("meta"),
    "default device": default_device,
}


def stepped(model: nn.Module) -> list[torch.Tensor]:
    """The output and the parameters after one step, and the output after another one."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    out = model(X)
    out.square().sum().backward()
    optimizer.step()
    return [out, model(X), *(parameter for parameter in model.parameters())]


@pytest.mark.parametrize("bases", ["uniform", "sparse", "structured"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["inject", "load"])
def test_an_adapter_is_the_same_in_every_mode(mode: str, how: str, bases: str, tmp_path: Path) -> None:
    seed = 100 * list(MODES).index(mode) + (how == "load")  # bases that no other test has drawn before
    config = RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"], bases=bases, seed=seed)
    plain, model = mlp(), mlp()
    path = tmp_path / "adapter.safetensors"
    with MODES[mode]():
        inject(model, config)
        model(X)
    if how == "load":
        randomize(model)
        with MODES[mode]():
            save_adapter(model, path)
        model = mlp()
        with MODES[mode]():
            load_adapter(model, path, trainable=True)
        load_adapter(plain, path, trainable=True)
    else:
        inject(plain, config)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert {parameter.dtype for _, parameter in adapter_parameters(model)} == {torch.float32}
    for ours, theirs in zip(stepped(model), stepped(plain), strict=True):
        assert torch.equal(ours, theirs)
    expected = model(X)
    with MODES[mode]():
        merge(model)
        remove(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    model(X).sum().backward()


def test_a_model_of_inference_tensors_is_adapted_for_inference_only(tmp_path: Path) -> None:
    source = mlp()
    inject(source, CONFIG)
    randomize(source)
    path = save_adapter(source, tmp_path / "adapter.safetensors")
    with torch.inference_mode():
        model = mlp()
        before = structure(model)
        for call in (
            lambda: inject(model, CONFIG),
            lambda: load_adapter(model, path, trainable=True),
        ):
            with pytest.raises(ValueError, match=r"0: its weight was created in inference mode.*outside of"):
                call()
            assert structure(model) == before
        load_adapter(model, path)
        assert torch.equal(model(X), source(X))
        merge(model)
        torch.testing.assert_close(model(X), source(X))
    remove(model)


def structure(model: nn.Module) -> dict[str, object]:
    """What a refused call must not change; inference tensors have no version counter."""
    return {name: (type(module), sorted(module._parameters)) for name, module in model.named_modules()} | {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    }
