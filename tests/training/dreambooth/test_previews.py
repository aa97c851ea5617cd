"""Pictures between steps: no second copy of the weights, of the base, of the adapted pipeline or of a saved file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks.live import LiveBytes
from randlora_vision.training.dreambooth.defaults import resolve
from randlora_vision.training.dreambooth.families import FAMILIES
from randlora_vision.training.dreambooth.methods import adapt
from randlora_vision.training.dreambooth.objectives import ObjectiveOptions
from randlora_vision.training.dreambooth.options import DreamBoothAdapterOptions, DreamBoothOptions
from randlora_vision.training.dreambooth.samples import Gallery, Sampler
from tests.tiny_pipelines import CONTEXT, FLUX, flux


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_pictures_take_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    pipe = flux()
    wide = dict(attention_head_dim=64, axes_dims_rope=(16, 24, 24))
    pipe.register_modules(transformer=FluxTransformer2DModel(**{**FLUX, **wide}))
    family = FAMILIES["FluxPipeline"](pipe, ObjectiveOptions(), CONTEXT)
    gallery = Gallery(Sampler(family, (16, 16), 2, nullcontext, steps=2, guidance=3.0), ["a dog"], 2, 1, False)
    weights = 4 * sum(parameter.numel() for parameter in family.denoiser.parameters())
    assert weights > 2**21
    live = LiveBytes()

    def added() -> int:
        """The bytes that drawing takes besides those that exist."""
        live.see(parameter for part in pipe.components.values() if isinstance(part, torch.nn.Module)
                 for parameter in part.parameters())  # fmt: skip
        live.peak = before = live.now
        with live:
            gallery.draw()
        return live.peak - before

    assert added() < weights / 2
    adaptation = adapt(family, resolve(DreamBoothOptions(adapter=DreamBoothAdapterOptions(rank=8))))
    adaptation.save(tmp_path / "adapter.safetensors")
    gallery.draw()  # the bases are drawn
    with adaptation.with_saved(tmp_path / "adapter.safetensors"):
        assert added() < weights / 2
