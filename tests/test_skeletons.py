"""Models on the meta device equal the real ones in all but their values."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from randlora_vision.skeletons import shapes_only, skeleton
from tests.helpers import clip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
    "timm with batch norms": lambda: timm.create_model("resnet10t"),
    "open_clip": clip,
    "torch": lambda: nn.TransformerEncoderLayer(16, 2),
}


def described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    with shapes_only():
        skeleton = MODELS[name]()
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    assert described(skeleton) == described(MODELS[name]())


def test_nothing_is_drawn_for_it_and_real_tensors_are_filled() -> None:
    calls: list[str] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watched(), shapes_only():
        nn.Linear(4, 4)
        real = torch.empty(3, device="cpu")
        nn.init.ones_(real)
    assert real.tolist() == [1, 1, 1]
    assert not any("uniform" in call for call in calls) and any("fill" in call for call in calls)


def test_a_constructor_that_needs_values_gets_them() -> None:
    """As RegNet's of older timm."""

    def build() -> nn.Module:
        return nn.Linear(len(torch.unique(torch.tensor([1, 2, 2]))), int(torch.arange(4).max().item()))

    made = skeleton(build)
    assert (made.in_features, made.out_features) == (2, 3)
    assert skeleton(lambda: nn.Linear(2, 3)).weight.is_meta
    with pytest.raises(ZeroDivisionError):
        skeleton(lambda: nn.Linear(1 // 0, 1))
