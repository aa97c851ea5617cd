"""Each use of PyTorch's private API on its own, to show what an update of torch breaks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from randlora_vision import torch_internals as internals

PRIVATE = (
    "torch._C",
    "aten._unsafe_view",
    "._cdata",
    "._version",
    "_non_persistent_buffers_set",
    "_state_dict_pre_hooks",
    "_is_fsdp_managed_module",
    "Module.to_empty",
    "torch._dynamo",
    "_dynamo_marked_constant",
    ".fake_mode",
    "allow_non_fake_inputs",
)


def test_views_share_a_storage_key() -> None:
    tensor = torch.zeros(4, 4)
    assert internals.storage_key(tensor[1:].t()) == internals.storage_key(tensor)
    assert internals.storage_key(tensor.clone()) != internals.storage_key(tensor)


def test_an_in_place_change_raises_the_version() -> None:
    tensor = torch.zeros(3)
    before = internals.version(tensor)
    tensor[1:].add_(1)
    assert internals.version(tensor) > before


def test_hooks_of_others_are_noticed() -> None:
    assert internals.saved_tensor_hooks_are_free()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert not internals.saved_tensor_hooks_are_free()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not internals.saved_tensor_hooks_are_free()
    assert internals.saved_tensor_hooks_are_free()


def test_wrapped_tensors_are_noticed() -> None:
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(internals.is_functorch_wrapped(x))
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    assert found == [True] and not internals.is_functorch_wrapped(torch.ones(2))


def test_a_reshaped_result_may_be_written_to() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return (2 * x).view(2, 2)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 2 * grad.reshape(4)

    x = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="custom Function"):
        Double.apply(x).mul_(3)
    for view in (internals.unsafe_view, internals.eager_unsafe_view):
        x.grad = None
        out = view(Double.apply(x), (4, 1))
        assert out.shape == (4, 1) and not out._is_view()
        out.mul_(3).sum().backward()
        assert x.grad is not None and x.grad.tolist() == [6.0] * 4


def test_names_are_those_of_the_state_dict() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert sorted(internals.persistent_names(module)) == sorted(module.state_dict())


def test_load_hooks_come_off_again() -> None:
    calls: list[str] = []

    def before(*_: object) -> None:
        calls.append("before")

    def after(*_: object) -> None:
        calls.append("after")

    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(before)
    module.register_load_state_dict_post_hook(after)
    module.load_state_dict(module.state_dict())
    assert calls == ["before", "after"]
    internals.remove_hooks(module, before, after)
    module.load_state_dict(module.state_dict())
    assert calls == ["before", "after"]


def test_call_hooks_have_the_given_key_and_come_off_again() -> None:
    calls: list[object] = []

    def before(module: nn.Module, args: object, kwargs: object) -> None:
        calls.append(kwargs)

    def after(module: nn.Module, args: object, output: object) -> None:
        calls.append(output)

    module = nn.Linear(2, 2)
    handle = module.register_forward_pre_hook(lambda module, args: None)
    internals.set_call_hooks(module, -5, before, after)
    with pytest.raises(RuntimeError):
        module(input=torch.ones(3))
    assert [list(call) if call else call for call in calls] == [["input"], None]  # also after an error
    assert -5 in module._forward_hooks and handle.id in module._forward_pre_hooks
    internals.remove_hooks(module, before, after)
    module(torch.ones(2))
    assert len(calls) == 2


def test_emptying_is_told_from_moving() -> None:
    found: list[bool] = []

    class Layer(nn.Linear):
        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
            found.append(internals.makes_empty(fn))
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    layer = nn.Sequential(Layer(2, 2))
    layer.to("meta").to_empty(device="cpu").half().float()
    assert found == [False, True, False, False]


def test_modules_in_fsdp_are_known(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    first, second = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    assert not internals.is_fsdp_managed(first[0])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.warns(UserWarning, match="NO_SHARD"):
            FullyShardedDataParallel(first, use_orig_params=True, device_id=torch.device("cpu"))
        fully_shard(second)
    finally:
        torch.distributed.destroy_process_group()
    assert internals.is_fsdp_managed(first[0]) and internals.is_fsdp_managed(second[0])


@pytest.mark.parametrize("folder", ["randlora_vision", "integrations", "train_scripts"])
def test_nothing_else_uses_them(folder: str) -> None:
    for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
        if path.name != "torch_internals.py":
            found = [name for name in PRIVATE if name in path.read_text()]
            assert not found, f"{path}: {found}"


def test_a_fake_tensor_has_a_mode_except_in_export() -> None:
    with FakeTensorMode() as mode:
        assert internals.fake_mode_of(torch.ones(2)) is mode
        assert internals.fake_mode_of(nn.Parameter(torch.ones(2))) is mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert internals.fake_mode_of(torch.ones(2)) is None
    for real in (torch.ones(2), nn.Parameter(torch.ones(2)), nn.Buffer(torch.ones(2))):
        assert internals.fake_mode_of(real) is None


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def marked() -> None: ...

    def expected() -> None: ...

    internals.assumed_constant(marked)
    torch.compiler.assume_constant_result(expected)
    assert vars(marked) == vars(expected) != {}


def test_export_is_noticed() -> None:
    seen = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(internals.is_exporting())
            return x

    torch.export.export(Model(), (torch.ones(2),))
    assert any(seen) == hasattr(torch.compiler, "is_exporting") and not internals.is_exporting()
    seen.clear()
    with warnings.catch_warnings():  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        torch.jit.trace(Model(), (torch.ones(2),))
    assert seen[0] and not internals.is_exporting()


def test_results_are_not_written_into_tensors_while_anything_records() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = {}

    def record(name: str) -> Any:
        def function(x: Tensor) -> Tensor:
            seen[name] = internals.writes_are_private()
            return x * 2

        return function

    with torch.no_grad():
        record("no gradients")(torch.ones(2))
        make_fx(record("make_fx"))(torch.ones(2))
        torch.vmap(record("vmap"))(torch.ones(2))
    record("gradients")(torch.ones(2))
    assert [name for name, private in seen.items() if private] == ["no gradients"]


def test_autocast_is_noticed() -> None:
    assert not internals.is_autocast_on()
    for device in ("cpu", "cuda"):
        with warnings.catch_warnings():  # there may be no GPU
            warnings.simplefilter("ignore")
            with torch.autocast(device, torch.bfloat16):
                on = torch.is_autocast_enabled(device)
                assert internals.is_autocast_on() == on and (on or device == "cuda")
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert not internals.is_autocast_on()
