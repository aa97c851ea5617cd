"""The presets on every family of diffusers denoisers: adapters act, train, merge, are removed and are saved.

The models are those of the zoo and two more; the reference outputs come from the frozen base: see test_zoo.py.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
    unmerge,
)
from randlora_vision.injection.selection import preset_names
from tests.layers.test_zoo import MOVED, SAME, assert_same, difference, draw, is_rounding, is_unreachable, snapshot
from tests.layers.test_zoo import one_thread as one_thread
from tests.zoo.base import Entry, numbers, reading
from tests.zoo.from_diffusers import CHANNELS, HEADS, TEXT, denoiser, denoising, flux, steps
from tests.zoo.from_diffusers import ENTRIES as SHARED

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]


def flux2(model: nn.Module) -> dict[str, object]:
    """Flux with positions of four numbers."""
    inputs = flux(model, guidance=torch.tensor([3.5, 3.5]))
    wider = {name: torch.nn.functional.pad(inputs[name], (0, 1)) for name in ("img_ids", "txt_ids")}
    return inputs | wider


def run_z_image(model: nn.Module) -> Tensor:
    """Takes and returns lists of images (C, F, H, W) and of texts (T, D)."""
    images, texts = numbers(model, 2, CHANNELS, 1, 8, 8), numbers(model, 2, 5, TEXT)
    outputs = model(list(images), steps().to(images.dtype) / 10, list(texts), return_dict=False)[0]
    return torch.stack(list(outputs)).flatten()


# fmt: off
INSIDE = dict(float32_inside=True)
MORE = [
    denoiser("flux2", "Flux2Transformer2DModel",
             dict(HEADS, in_channels=2 * CHANNELS, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
                  axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16), flux2, **INSIDE),
    replace(
        denoiser("z_image", "ZImageTransformer2DModel",
                 dict(in_channels=CHANNELS, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                      cap_feat_dim=TEXT, axes_dims=[4, 6, 6], axes_lens=[64, 16, 16]), denoising, **INSIDE),
        run=run_z_image,
    ),
]
# fmt: on
# Left out: the autoencoder, which is not a denoiser, and the UNet that differs only in its zoo target.
ENTRIES = [entry for entry in (*SHARED, *MORE) if not entry.name.endswith(("autoencoder", "unet_sd15_all"))]
every_family = pytest.mark.parametrize("entry", [pytest.param(e, id=e.name.partition("/")[2]) for e in ENTRIES])
PRESETS = ("attention", "backbone", "conv")
# Parts in the blocks of a denoiser besides attention, MLPs and convolutions.
OUTSIDE = re.compile(r"norm|emb|time|modulation|(^|\.)(img|txt)_mod\.|adaln|caption|guidance|pooler|context_embedder")


def config(preset: str = "conv") -> RandLoRAConfig:
    """The widest preset; the others choose a subset of its targets."""
    return RandLoRAConfig(rank=4, target_modules=f"diffusers:{preset}")


def test_the_zoo_is_large_enough() -> None:
    assert len({type(entry.build()) for entry in ENTRIES}) >= 15


@every_family
def test_presets_nest_and_choose_by_role(entry: Entry) -> None:
    model = entry.build()
    attention, backbone, conv = (preset_names(model, f"diffusers:{name}") for name in PRESETS)
    assert attention and set(attention) <= set(backbone) <= set(conv)
    assert len(set(conv)) == len(conv) and not [name for name in conv if OUTSIDE.search(name)]
    # Every projection with such a name in an attention, except in poolings and embedders.
    called = re.compile(r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$")
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and called.search(n)}
    assert {name for name in wanted if not OUTSIDE.search(name)} <= set(attention)
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], nn.Linear) for name in attention)
    pointwise = [m for m in map(modules.get, backbone) if not isinstance(m, nn.Linear)]
    assert all(m.kernel_size == (1, 1) and m.groups == 1 for m in pointwise)
    # An MLP widens, or narrows, in every family; a UNet without transformers has none.
    mlp = [name for name in set(backbone) - set(attention) if re.search(r"ff|mlp|feed_forward|proj_out", name)]
    assert mlp or type(model).__name__ == "UNet2DModel" or "to_qkv_mlp_proj" in str(attention)
    assert (set(conv) == set(backbone)) == (not type(model).__name__.startswith("UNet"))


@every_family
def test_adapters_act_and_learn(entry: Entry) -> None:
    model = entry.build().requires_grad_(False)
    reference = entry.run(model)
    report = inject(model, config())
    assert difference(entry.run(model), reference) < SAME
    draw(model)
    assert difference(entry.run(model), reference) > MOVED
    model.double()
    reading(entry.run(model)).backward()
    parameters = dict(adapter_parameters(model))
    assert len(parameters) == 2 * len(report.targets)
    largest = max(p.grad.abs().max().item() for p in parameters.values() if p.grad is not None)
    dead = {name for name, p in parameters.items() if is_rounding(p.grad, largest)}
    assert dead == {name for name in parameters if is_unreachable(entry, name)}


@every_family
@torch.no_grad()
def test_adapters_are_merged_moved_and_removed(entry: Entry, tmp_path: Path) -> None:
    model = entry.build()
    reference = entry.run(model)
    before, expected = snapshot(model), plan(model, config()).targets
    assert inject(model, config()).targets == expected
    draw(model)
    apart = entry.run(model)
    merge(model)
    assert difference(entry.run(model), apart) < SAME
    unmerge(model)
    assert torch.equal(entry.run(model), apart)
    other = entry.build()
    load_adapter(other, save_adapter(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(entry.run(other), apart)
    remove(model)
    assert_same(snapshot(model), before)
    assert torch.equal(entry.run(model), reference)
