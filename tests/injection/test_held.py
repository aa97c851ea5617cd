"""Weights that a host keeps elsewhere: every writer works there, or refuses before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    disabled,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
    set_active,
    set_scale,
    unmerge,
)
from randlora_vision.integrations.export.merged import save_merged_file
from randlora_vision.integrations.export.updates import updates
from tests.helpers import mlp, randomize

CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"])
X = torch.linspace(-1, 1, 24).reshape(3, 8)
CPU = torch.device("cpu")


def on_cpu(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def on_disk(model: nn.Module, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(folder), CPU)


def dispatched(model: nn.Module, folder: Path) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=str(folder))


def as_one(model: nn.Module, folder: Path) -> None:
    """One hook for a module and its parts, as for `preload_module_classes`."""
    from accelerate import cpu_offload

    cpu_offload(model, CPU, preload_module_classes=["Sequential"])


OFFLOADS = {"cpu": on_cpu, "disk": on_disk, "dispatch": dispatched, "as one": as_one}
offloads = pytest.mark.parametrize("offload", OFFLOADS)


def adapted() -> nn.Module:
    model = mlp()
    inject(model, CONFIG)
    randomize(model)
    return model


@offloads
def test_offloaded_after_inject_nothing_is_written_and_everything_is_saved(offload: str, tmp_path: Path) -> None:
    plain, model = adapted(), adapted()
    OFFLOADS[offload](model, tmp_path / "weights")
    expected = plain(X)
    assert torch.equal(model(X), expected)
    writers: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(model),
        "remove": lambda: remove(model),
        "delete": lambda: delete_adapter(model, "default"),
        "set lambda": lambda: list(adapter_parameters(model)),
        "save merged": lambda: save_merged_file(model, tmp_path / "merged.safetensors"),
        "export": lambda: [update.delta() for update in updates(model, None)],
    }
    for name, write in writers.items():
        with pytest.raises(ValueError, match="offloaded.*(before|hooks first)"):
            write()
        assert torch.equal(model(X), expected), name
    assert not (tmp_path / "merged.safetensors").exists()
    set_scale(plain, 0.5)
    set_scale(model, 0.5)
    assert torch.equal(model(X), plain(X))
    with disabled(model):
        assert torch.equal(model(X), mlp()(X))
    ours, theirs = (save_adapter(m, tmp_path / f"{n}.safetensors") for n, m in (("ours", model), ("theirs", plain)))
    assert ours.read_bytes() == theirs.read_bytes()


@offloads
def test_merged_before_offloading_stays_merged(offload: str, tmp_path: Path) -> None:
    model = adapted()
    expected = model(X)
    merge(model)
    merged = model(X)
    torch.testing.assert_close(merged, expected)
    OFFLOADS[offload](model, tmp_path)
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        unmerge(model)
    with pytest.raises(ValueError, match="cannot disable merged adapters"), disabled(model):
        pass
    assert torch.equal(model(X), merged)
    remove(model)  # lambda and gamma of merged adapters are not offloaded
    assert torch.equal(model(X), merged) and list(model.state_dict()) == list(mlp().state_dict())


def test_a_merged_weight_that_hides_a_parametrization_stays_while_it_is_offloaded(tmp_path: Path) -> None:
    model = mlp()
    for layer in (model[0], model[2]):
        torch.nn.utils.parametrizations.spectral_norm(layer)
    model.eval()
    inject(model, CONFIG)
    randomize(model)
    merge(model)
    merged = model(X)
    on_cpu(model, tmp_path)
    with pytest.raises(ValueError, match="cannot remove adapters: 0 is offloaded layer by layer"):
        remove(model)
    assert torch.equal(model(X), merged)


@offloads
@pytest.mark.parametrize("how", ["inject", "load"])
def test_adapters_are_added_to_offloaded_layers_and_trained(offload: str, how: str, tmp_path: Path) -> None:
    """The truth is the same model, not offloaded: outputs, gradients and steps are bit for bit the same."""
    from accelerate.hooks import remove_hook_from_module

    plain, model, base = adapted(), mlp(), mlp()(X)
    OFFLOADS[offload](model, tmp_path / "weights")
    if how == "inject":
        inject(model, CONFIG)
        assert torch.equal(model(X), base)
        randomize(model)
    else:
        load_adapter(model, save_adapter(plain, tmp_path / "adapter.safetensors"), trainable=True)
    assert {parameter.device for _, parameter in adapter_parameters(model)} == {CPU}
    assert any(parameter.is_meta for parameter in model.parameters())  # the weights stay offloaded
    for each in (plain, model):
        each(X).square().sum().backward()
        torch.optim.SGD([parameter for _, parameter in adapter_parameters(each)], lr=0.01).step()
    assert torch.equal(model(X), plain(X))
    with pytest.raises(ValueError, match="cannot merge"):
        merge(model)
    inject(model, CONFIG, "second")
    set_active(model, "default")
    delete_adapter(model, "second")
    assert torch.equal(model(X), plain(X))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X), plain(X)) and not any(parameter.is_meta for parameter in model.parameters())
    merge(model)
    remove(model)
    torch.testing.assert_close(model(X), plain(X))


def test_an_adapter_is_removed_from_an_offloaded_layer(tmp_path: Path) -> None:
    model, base = mlp(), mlp()(X)
    on_disk(model, tmp_path)
    inject(model, CONFIG)
    randomize(model)
    assert not torch.allclose(model(X), base)
    remove(model)
    assert torch.equal(model(X), base) and [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]


def test_a_second_adapter_beside_one_that_the_hooks_hold(tmp_path: Path) -> None:
    plain, model = adapted(), adapted()
    on_cpu(model, tmp_path)
    for each in (plain, model):
        inject(each, CONFIG, "second")
        set_scale(each, 0.5, "default")
    second = [
        tensor
        for each in (plain, model)
        for layer in (each[0], each[2])
        for tensor in layer.adapter_tensors("weight", "second")
    ]
    with torch.no_grad():
        for ours, theirs in zip(second[:4], second[4:], strict=True):
            theirs.copy_(ours.add_(0.1))
    assert torch.equal(model(X), plain(X)) and not torch.equal(model(X), adapted()(X))


def test_layers_that_are_only_placed_are_merged() -> None:
    """Hooks of `dispatch_model` that move inputs, and no weights, hold nothing."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = mlp()
    for layer in model:
        add_hook_to_module(layer, AlignDevicesHook(CPU))
    inject(model, CONFIG)
    randomize(model)
    expected = model(X)
    merge(model)
    torch.testing.assert_close(model(X), expected)
    remove(model)
    torch.testing.assert_close(model(X), expected)


def test_modules_trained_in_full_are_not_switched_while_they_are_offloaded(tmp_path: Path) -> None:
    config = RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"])
    model, late = mlp(), mlp()
    inject(model, config)
    for each in (model, late):
        on_cpu(each, tmp_path)
    expected = model(X)
    with pytest.raises(ValueError, match="trained in full.*offloaded"), disabled(model):
        pass
    with pytest.raises(ValueError, match="switch modules.*offloaded"):
        set_active(model, ())
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match=r"modules_to_save.*2.weight is offloaded"):
        inject(late, config)
    assert type(late[0]) is nn.Linear


# Others that hold weights.


class Grouped(nn.Module):
    """A model that diffusers' group offloading accepts: it finds blocks in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_offloaded_groups(kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    model, late = Grouped(), Grouped()
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    expected = model(X)
    for each in (model, late):
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(each, onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)
    for change in (merge, remove):
        with pytest.raises(ValueError, match="layer by layer.* before enable_group_offload"):
            change(model)
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="cannot add an adapter.* before enable_group_offload"):
        inject(late, RandLoRAConfig(rank=2))


def test_a_float8_weight_is_not_merged_into() -> None:
    model = adapted()
    model.to(torch.float8_e4m3fn)
    before = [parameter.view(torch.uint8).clone() for parameter in (model[0].base_weight(), model[2].base_weight())]
    with pytest.raises(ValueError, match=r"0.weight is stored in torch.float8_e4m3fn.*before enable_layerwise_casting"):
        merge(model)
    after = [parameter.view(torch.uint8) for parameter in (model[0].base_weight(), model[2].base_weight())]
    assert all(map(torch.equal, before, after))


def test_a_model_without_values_is_not_merged_into() -> None:
    with torch.device("meta"):
        model = mlp()
    inject(model, CONFIG)
    with pytest.raises(ValueError, match=r"cannot merge .*: 0.weight is on the meta device"):
        merge(model)
    remove(model)


def test_partitioned_weights() -> None:
    """DeepSpeed's ZeRO-3 leaves empty vectors with an attribute `ds_id` in the place of the weights."""
    model, late = adapted(), mlp()
    for each in (model, late):
        for i, parameter in enumerate(each.parameters()):
            parameter.ds_id = i  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
    assert model[0].weight is model[0].base_weight()  # DeepSpeed reads by attribute
    for change in (merge, remove):
        with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3"):
            change(model)
    for add in (inject, plan):
        with pytest.raises(ValueError, match=r"cannot add an adapter: 0 is partitioned .*before deepspeed.initialize"):
            add(late, CONFIG)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_holds_the_weights(version: int, tmp_path: Path) -> None:
    """One process; two are in `sharded_cases`."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, late, plain = adapted(), mlp(), adapted()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, other = (
            FullyShardedDataParallel(each, use_orig_params=True, device_id=CPU) if version == 1 else fully_shard(each)
            for each in (model, late)
        )
        for each in (wrapped, plain):
            each(X).square().sum().backward()
        for (name, ours), (_, theirs) in zip(adapter_parameters(wrapped), adapter_parameters(plain), strict=True):
            gradient = ours.grad.full_tensor() if version == 2 else ours.grad
            torch.testing.assert_close(gradient, theirs.grad, msg=name)
        assert torch.equal(wrapped(X), plain(X))
        for change in (merge, remove):
            with pytest.raises(ValueError, match="sharded by FSDP.*before the model is wrapped"):
                change(wrapped)
        with pytest.raises(ValueError, match="cannot add an adapter: .* is sharded by FSDP"):
            inject(other, CONFIG)
        assert torch.equal(wrapped(X), plain(X))
    finally:
        torch.distributed.destroy_process_group()
