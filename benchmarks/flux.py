"""Injection into a 12-billion-parameter Flux on the meta device: its duration, and the size of the bases.

python -m benchmarks.flux
"""

import itertools
import time

import torch

from randlora_vision import RandLoRAConfig, inject


def main() -> None:
    """Inject every kind of bases into every attention and MLP layer, and print the cost."""
    from diffusers import FluxTransformer2DModel

    print(
        "| bases | dtype | layers | trained | injection | bases in memory |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for kind, dtype in itertools.product(("uniform", "sparse", "structured"), (torch.float32, torch.bfloat16)):
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = FluxTransformer2DModel(guidance_embeds=True)
        size = sum(p.numel() for p in model.parameters())
        started = time.perf_counter()
        report = inject(model, RandLoRAConfig(rank=32, target_modules="all-linear", bases=kind))
        seconds = time.perf_counter() - started
        print(
            f"| {kind} | {str(dtype).removeprefix('torch.')} | {len(report.targets)} "
            f"| {report.num_parameters:,} | {seconds:.2f} s | {report.bases_bytes / 1e6:,.1f} MB |"
        )
    print(f"\nFlux of {size / 1e9:.1f} billion parameters, rank 32, all-linear.")


if __name__ == "__main__":
    main()
