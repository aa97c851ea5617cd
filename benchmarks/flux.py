"""A 12-billion-parameter Flux on the meta device: what injecting and loading an adapter costs.

python -m benchmarks.flux
python -m benchmarks.flux --rank 256 --kinds structured

Loading reads the file, verifies its SHA-256 and that of the bases, and copies lambda and gamma; no layer is computed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_vision import RandLoRAConfig, inject, load_adapter
from randlora_vision.bases import Bases, get_bases
from randlora_vision.files import adapter_file


def main() -> None:
    """Inject every kind of bases into every attention and MLP layer, load the file, and print the cost."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flux",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--kinds", nargs="+", default=["uniform", "sparse", "structured"], help="kinds of bases")
    options = parser.parse_args()
    print("| bases | layers | trained | injection, CPU | file | loading, CPU | drawn | bases in memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in options.kinds:
        config = RandLoRAConfig(rank=options.rank, target_modules="all-linear", bases=kind)
        model, other = _flux(), _flux()
        report, injection = _cpu_seconds(lambda model=model, config=config: inject(model, config))
        sizes = [(t.name, t.rank, t.bases, t.narrow) for t in report.targets]
        values = {name: (torch.zeros(r, n), torch.zeros(n, m)) for name, r, n, m in sizes}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            spec = model.__dict__["_randlora_record"].adapters["default"].spec
            packed = adapter_file.pack(config, spec, get_bases(spec).sha256, report.targets, values, {})
            adapter_file.write(path, *packed)
            del values, packed, model
            with _Drawing() as drawing:
                _, loading = _cpu_seconds(lambda other=other, path=path: load_adapter(other, path))
            size = path.stat().st_size
        print(
            f"| {kind} | {len(report.targets)} | {report.num_parameters:,} | {injection:.2f} s | {size / 1e6:,.0f} MB "
            f"| {loading:.2f} s | {len(drawing.shapes)} matrices | {report.bases_bytes / 1e6:,.1f} MB |"
        )
    print(f"\nFlux of {sum(p.numel() for p in _flux().parameters()) / 1e9:.1f} billion parameters, all-linear.")


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def _cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return function(), time.process_time() - started


class _Drawing:
    """Notes which matrices are drawn within the block."""

    def __enter__(self) -> "_Drawing":
        self.shapes: list[tuple[int, ...]] = []
        self._numbers = Bases._numbers

        def noted(bases: Bases, matrix: int) -> torch.Tensor:
            found = self._numbers(bases, matrix)
            self.shapes.append(tuple(found.shape))
            return found

        Bases._numbers = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Bases._numbers = self._numbers  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
