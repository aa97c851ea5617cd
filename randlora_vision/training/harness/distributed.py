"""Communication between processes: gathering rows with correct gradients, and sharing evaluation.

Shapes: P processes, N rows of all processes together, n rows of this one.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, IterableDataset

from randlora_vision.training.harness.seeding import with_batches


def process_and_processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def largest(value: int, device: torch.device) -> int:
    """Return the largest of the values of all processes; every process must call it."""
    if process_and_processes()[1] == 1:
        return value
    shared = torch.tensor(value, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared)


def row_counts(rows: int, device: torch.device) -> list[int]:
    """Return how many rows each process has, in the order of the processes (P); every process must call it."""
    if process_and_processes()[1] == 1:
        return [rows]
    return _AllGather.apply(torch.tensor(rows, device=device)).tolist()


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows (N, ...) of all processes, in the order of the processes, given this one's (n, ...).

    `counts` is the result of `row_counts`; the counts need not be equal. The gradient of `rows` is the sum of
    the gradients from all processes.
    """
    if len(counts) == 1:
        return rows
    most = max(counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(_AllGather.apply(padded), counts, strict=True)])


def measure_all(batches: Iterable[Any], measure: Callable[[Any], Sequence[Tensor]]) -> list[Tensor]:
    """Return the results of `measure` for all batches, on the CPU, concatenated in the order of the batches.

    `measure` returns tensors with one row per item of its batch. Each of several processes measures every
    P-th batch, and all of them receive every row, exactly as a single process would compute them. If the
    batches cannot be divided evenly, some processes measure an extra batch, whose result is dropped, so that
    models whose processes must run in lockstep (FSDP) can be evaluated too.

    Raises ValueError when there are no batches.
    """
    process, processes = process_and_processes()
    places, results = [], []
    for number, batch in _own_batches(batches, process, processes):
        values = [value.detach() for value in measure(batch)]
        places.append((number, len(values[0])))
        results.append(values)
    if not results:
        raise ValueError("there is nothing to evaluate: the data has no batches")
    columns = [torch.cat(column) for column in zip(*results, strict=True)]
    if processes == 1:
        return [column.cpu() for column in columns]
    device = columns[0].device
    counts = row_counts(len(columns[0]), device)
    all_places = gather_rows(torch.tensor(places, device=device), row_counts(len(places), device)).tolist()
    numbers = [number for number, _ in all_places]
    kept = sorted((number, at) for at, number in enumerate(numbers) if number >= 0)
    sizes = [size for _, size in all_places]
    return [_in_order(gather_rows(column, counts).cpu(), sizes, [at for _, at in kept]) for column in columns]


def _in_order(rows: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    chunks = rows.split(list(sizes))
    return torch.cat([chunks[at] for at in order])


def _own_batches(batches: Iterable[Any], process: int, processes: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, batch) for a process, equally many on every process; a repeated batch has the number -1."""
    if processes == 1:
        yield from enumerate(batches)
    elif isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
        chosen = list(batches.batch_sampler or ())
        numbers = range(process, math.ceil(len(chosen) / processes) * processes, processes)
        own = with_batches(batches, batches.dataset, [chosen[number % len(chosen)] for number in numbers])
        yield from zip((number if number < len(chosen) else -1 for number in numbers), own, strict=True)
    else:
        yield from _every_other(batches, process, processes)


def _every_other(batches: Iterable[Any], process: int, processes: int) -> Iterator[tuple[int, Any]]:
    """Do the same for batches that can only be read in order."""
    numbered = enumerate(batches)
    first = None
    for group in iter(lambda: list(itertools.islice(numbered, processes)), []):
        first = group[0] if first is None else first
        yield group[process] if process < len(group) else (-1, first[1])


class _AllGather(torch.autograd.Function):
    """Gather rows (n, ...), of the same shape on all processes, to (P, n, ...), in every version of PyTorch."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        process, processes = process_and_processes()
        ctx.process = process
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(processes)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.process]
