"""The measurements of one method on one workload."""

import contextlib
import copy
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import EVERY, METHODS, trained_numbers
from benchmarks.workloads import WORKLOADS, Inputs, Row
from randlora_vision.torch_internals import storage_key


@dataclass
class Trainee:
    """A model that a method was applied to, with its optimiser and inputs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    loss: Callable[[Any], Tensor]
    dtype: torch.dtype

    def step(self) -> None:
        """Make one training step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        """Return the loss."""
        device = next(iter(self.inputs.values())).device.type
        low = self.dtype != torch.float32
        with torch.autocast(device, self.dtype) if low else contextlib.nullcontext():
            return self.loss(self.model(**self.inputs))


def prepare(row: Row, base: nn.Module, method: str, device: torch.device, dtype: torch.dtype) -> tuple[Trainee, float]:
    """Apply a method to a copy of `base`; return it and the duration of the injection in seconds."""
    return adapted(row, copy.deepcopy(base), method, device, dtype)


def adapted(row: Row, base: nn.Module, method: str, device: torch.device, dtype: torch.dtype) -> tuple[Trainee, float]:
    """As `prepare`, without the copy."""
    workload = WORKLOADS[row.workload]
    model = base.requires_grad_(False)
    targets = workload.targets(model, row.which)
    started = time.perf_counter()
    model = EVERY[method].apply(model, targets, workload.rank)
    seconds = time.perf_counter() - started
    model.train().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    inputs = workload.inputs(row.size, device)
    return Trainee(model, optimizer, inputs, workload.loss, dtype), seconds


def flops(trainee: Trainee) -> int:
    """Count the FLOPs of the matrix products in a step; a multiply-add counts as two.

    Attention is computed by its formula: a fused kernel does different work in the backward pass, and the choice of the
    kernel depends on the device, the CPU and the version of PyTorch.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainee.step()
    return counter.get_total_flops()


def uncomputed(row: Row, base: nn.Module, method: str) -> Trainee:
    """Apply a method on the meta device, where FLOPs and trained numbers can be counted without computing anything."""
    return prepare(row, base, method, torch.device("meta"), torch.float32)[0]


def kept_bytes(trainee: Trainee) -> int:
    """Return the bytes that autograd keeps from the forward to the backward pass, without parameters and inputs."""
    own = {storage_key(t) for t in (*trainee.model.parameters(), *trainee.model.buffers(), *trainee.inputs.values())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in own:
            kept[storage_key(tensor)] = tensor.detach()  # holding it keeps the key from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainee.forward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    trainee.optimizer.zero_grad(set_to_none=True)
    return size


def step_times(trainees: dict[str, Trainee], rounds: int) -> dict[str, list[float]]:
    """Time one step of every method in turn, `rounds` times, so that a disturbance affects all methods of a round."""
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    names = list(trainees)
    for trainee in trainees.values():
        trainee.step()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(trainees[name].step, trainees[name].inputs))
    return seconds


def timed(function: Callable[[], object], inputs: Inputs) -> float:
    """Return the seconds that a call takes, including what it starts on the inputs' GPU."""
    on_gpu = next(iter(inputs.values())).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def saved_bytes_and_load_time(trainee: Trainee, base: nn.Module, method: str) -> tuple[int, float]:
    """Save the trained parameters; return the size in bytes, and the seconds to load them into a fresh base model."""
    fresh = copy.deepcopy(base)
    device = next(trainee.model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        METHODS[method].save(trainee.model, Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        started = time.perf_counter()
        METHODS[method].load(fresh.to(device), Path(folder))
        return size, time.perf_counter() - started


def peak_memory(row: Row, method: str, device: torch.device, dtype: torch.dtype) -> int:
    """Return the peak bytes of two steps in a fresh process: CUDA's, or resident beyond those before the model.

    The process has one copy of the model: a second one, however short its life, would hide what the methods add. It is
    forked from one that has imported the libraries and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure", "peft", "timm"])
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (row, method, device, dtype))


def _peak_memory_here(row: Row, method: str, device: torch.device, dtype: torch.dtype) -> int:
    import peft  # noqa: F401  # every process has the same imports
    import timm  # noqa: F401

    warnings.simplefilter("ignore")
    before = _resident("VmRSS")
    trainee, _ = adapted(row, WORKLOADS[row.workload].build(), method, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimiser has its state from the second one on
        trainee.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Return the resident set in bytes, now (VmRSS) or at its peak (VmHWM; ru_maxrss would start from the parent's)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def trained(trainee: Trainee) -> int:
    """Return how many numbers are trained."""
    return trained_numbers(trainee.model)
