"""A 12-billion-parameter Flux on the meta device: what injecting and loading an adapter costs.

python -m benchmarks.flux
python -m benchmarks.flux --rank 256 --kinds structured

Loading reads the file, verifies its CRC-32, and copies lambda and gamma. The CRC-32 is computed in a thread beside the
rest. No layer is computed, and the bases are neither drawn nor verified: "bases, CPU" is what that takes when they are
needed. Times are those of the process on all its threads; Python's garbage is collected before they start.
"""

import contextlib
import gc
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import command_line
from benchmarks.report import size_text, table
from randlora_vision import RandLoRAConfig, inject, load_adapter
from randlora_vision.bases import Bases, get_bases
from randlora_vision.checksums import CRC32
from randlora_vision.files import adapter_file


def main() -> None:
    """Inject every kind of bases into every attention and MLP layer, load the file, and print the cost."""
    parser = command_line.parser("flux", __doc__)
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--kinds", nargs="+", default=["uniform", "sparse", "structured"], help="kinds of bases")
    options = parser.parse_args()
    costs = ["injection, CPU", "file", "loading, CPU", "its CRC-32 alone", "drawn", "bases, CPU", "in memory"]
    rows = [["bases", "layers", "trained", *costs]]
    for kind in options.kinds:
        config = RandLoRAConfig(rank=options.rank, target_modules="all-linear", bases=kind)
        model, other = _flux(), _flux()
        report, injection = _cpu_seconds(partial(inject, model, config))
        sizes = [(t.name, t.rank, t.bases, t.narrow) for t in report.targets]
        values = {name: (torch.zeros(r, n), torch.zeros(n, m)) for name, r, n, m in sizes}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            spec = model.__dict__["_randlora_record"].adapters["default"].spec
            packed = adapter_file.pack(config, spec, get_bases(spec).crc32, report.targets, values, {})
            adapter_file.write(path, *packed)
            del values, packed, model
            with _drawing() as drawn:
                _, loading = _cpu_seconds(partial(load_adapter, other, path))
            size = path.stat().st_size
        _, bases = _cpu_seconds(partial(get_bases(spec).checksum, CRC32))
        _, checking = _cpu_seconds(partial(zlib.crc32, bytearray(size)))
        costs = [
            f"{injection:.2f} s",
            size_text(size),
            f"{loading:.2f} s",
            f"{checking:.2f} s",
            f"{len(drawn)} matrices",
            f"{bases:.2f} s",
        ]
        counts = [f"{len(report.targets)}", f"{report.num_parameters:,}"]
        rows.append([kind, *counts, *costs, size_text(report.bases_bytes)])
    print(table(rows))
    print(f"Flux of {sum(p.numel() for p in _flux().parameters()) / 1e9:.1f} billion parameters, all-linear.")


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def _cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    started = time.process_time()
    return function(), time.process_time() - started


@contextlib.contextmanager
def _drawing() -> Iterator[list[torch.Size]]:
    """Collect the shapes of the matrices that are drawn within the block."""
    shapes: list[torch.Size] = []
    draw = Bases._numbers

    def recorded(bases: Bases, matrix: int) -> torch.Tensor:
        drawn = draw(bases, matrix)
        shapes.append(drawn.shape)
        return drawn

    with mock.patch.object(Bases, "_numbers", recorded):
        yield shapes


if __name__ == "__main__":
    main()
