"""Models in FSDP of both versions and in DDP, compared with one process: run by each of two processes.

Shapes of the inputs: (images, channels, height, width).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from randlora_vision import RandLoRAConfig, inject, load_adapter, merge, remove, save_adapter
from tests.helpers import randomize

BATCH = 8


class Block(nn.Module):
    """A block that calls a layer, reads the weight of another, and passes packed weights to a kernel."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.attention, self.fc, self.read = nn.MultiheadAttention(8, 2), nn.Linear(8, 12), nn.Linear(12, 8)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.run, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + nn.functional.linear(torch.tanh(self.fc(x)), self.read.weight, self.read.bias)


class Model(nn.Module):
    """A convolution, two blocks and a classifier."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(Block(checkpointed), Block(checkpointed))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))


def adapted(checkpointed: bool = False) -> Model:
    model = Model(checkpointed)
    inject(
        model,
        RandLoRAConfig(rank=4, alpha=2.0, target_modules="all", exclude_modules=["head"], modules_to_save=["head"]),
    )
    randomize(model)
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def fsdp1(model: Model) -> nn.Module:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)


def fsdp1_blocks(model: Model) -> nn.Module:
    policy, cpu = ModuleWrapPolicy({Block}), torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu)


def fsdp2(model: Model) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)  # type: ignore[no-any-return]


def check_sharded_models() -> None:
    """Train on half of the batch in each process, and compare state dicts, files and outputs with one process."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    rank, half = distributed.get_rank(), BATCH // 2
    own = slice(rank * half, (rank + 1) * half)
    start, one = adapted(), adapted()
    train(one, images, labels)
    with tempfile.TemporaryDirectory() as folder:
        wrappers: dict[str, Callable[[Model], nn.Module]] = {
            "DDP": DistributedDataParallel,
            "FSDP 1": fsdp1,
            "FSDP 1 in blocks": fsdp1_blocks,
            "FSDP 1 in blocks, checkpointed": fsdp1_blocks,
            "FSDP 2": fsdp2,
        }
        for name, wrap in wrappers.items():
            model = wrap(adapted("checkpointed" in name))
            train(model, images[own], labels[own])
            check_same(name, gathered(model), one.state_dict(), start.state_dict())
            if "FSDP" in name:
                check_sharded(name, model, Path(folder))
                path = save_gathered(model, Path(folder) / "two.safetensors")
                loaded = Model()
                load_adapter(loaded, path)
                check_same(name, loaded.state_dict(), one.state_dict(), start.state_dict())
            if "FSDP 1" in name:
                model.load_state_dict(start.state_dict())
                check_same(name, gathered(model), start.state_dict(), one.state_dict())


def gathered(model: nn.Module) -> dict[str, Tensor]:
    state = (model.module if isinstance(model, DistributedDataParallel) else model).state_dict()
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}


def check_same(name: str, actual: dict[str, Tensor], expected: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), name
    for key, tensor in expected.items():
        where = f"{name}, {key}"
        torch.testing.assert_close(actual[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{where}: {text}")  # noqa: B023
    moved = [key for key in expected if not torch.allclose(expected[key], other[key], rtol=0, atol=3e-4)]
    assert len(moved) > 10, name  # the comparison is not of untrained models


def check_sharded(name: str, model: nn.Module, folder: Path) -> None:
    """What would be lost at the next forward pass is refused, and so is what has no values on one process."""
    before = gathered(model)
    for change in (merge, remove, lambda model: inject(model, RandLoRAConfig(rank=4), "other")):
        with pytest.raises(ValueError, match="sharded by FSDP"):
            change(model)
    with pytest.raises(ValueError, match="sharded at .* gather it"):
        save_adapter(model, folder / "part.safetensors")
    after = gathered(model)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), name


def save_gathered(model: nn.Module, path: Path) -> Path:
    path = path.with_name(f"{distributed.get_rank()}-{path.name}")
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return save_adapter(model, path)
    parts = [part for part in model.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.unshard()  # type: ignore[operator]
    with pytest.raises(ValueError, match="sharded by FSDP"):  # the next resharding would undo it
        merge(model)
    save_adapter(model, path)
    for part in parts:
        part.reshard()  # type: ignore[operator]
    return path
