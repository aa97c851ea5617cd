"""The models that are measured, with random weights, since the timing does not depend on the weights.

T tokens, B images. The step of every workload is: forward, a scalar loss, backward, AdamW on the trained parameters.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


class Layer(nn.Module):
    """A linear layer in a named submodule, as PEFT needs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., inputs)."""
        return self.layer(x)


@dataclass(frozen=True)
class Workload:
    """A model, the sizes that it is measured at, and the nn.Linear layers that are adapted."""

    title: str  # name in the tables
    unit: str  # of the sizes ("images" or "tokens")
    sizes: tuple[int, ...]  # of the full run
    build: Callable[[], nn.Module]  # in float32 on the CPU
    inputs: Callable[[int, torch.device], Inputs]  # for a size, in float32
    loss: Callable[[Any], Tensor]  # maps the model's output to a scalar
    attention: str  # regular expression for complete paths of the attention layers
    mlp: str  # the same for the MLP layers
    rank: int = 32  # of RandLoRA

    def targets(self, model: nn.Module, which: str) -> list[str]:
        """Return the paths of the adapted layers; `which` is "attention" or "attention+mlp"."""
        pattern = self.attention if which == "attention" else f"{self.attention}|{self.mlp}"
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linears if re.fullmatch(pattern, name)]


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    workload: str
    size: int
    which: str

    @property
    def title(self) -> str:
        """Readable name of the row."""
        workload = WORKLOADS[self.workload]
        return f"{workload.title}, {self.size} {workload.unit}, {self.which}"


def full_rows() -> Iterator[Row]:
    """Yield the rows of the full run."""
    for name, workload in WORKLOADS.items():
        for size in workload.sizes:
            for which in ("attention", "attention+mlp"):
                yield Row(name, size, which)


def quick_rows() -> Iterator[Row]:
    """Yield the rows of --quick: a timed one, and larger ones for which only FLOPs are counted."""
    for name, size in (("vit_s", 4), ("vit_s", 16), ("vit_b", 64), ("sdxl_block", 4096)):
        yield Row(name, size, "attention+mlp")


def mean_square(output: Any) -> Tensor:
    """Return a scalar that depends on every element of the output."""
    outputs = output if isinstance(output, tuple) else (output,)
    return sum((tensor.float().square().mean() for tensor in outputs), torch.zeros(()))


def _vit(name: str, **settings: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=100, **settings)

    return build


def _images(size: int, device: torch.device, side: int = 224) -> Inputs:
    return {"x": torch.randn(size, 3, side, side, device=device)}


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig())  # the defaults are ViT-B/32, with separate q, k, v layers that PEFT can adapt


def _pairs(size: int, device: torch.device) -> Inputs:
    return {
        "pixel_values": torch.randn(size, 3, 224, 224, device=device),
        "input_ids": torch.randint(1, 49000, (size, 77), device=device),
    }


def _clip_loss(output: Any) -> Tensor:
    logits = output.logits_per_image.float()
    labels = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def _sdxl_block() -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(dim=1280, num_attention_heads=20, attention_head_dim=64, cross_attention_dim=2048)


def _sdxl_tokens(size: int, device: torch.device) -> Inputs:
    return {
        # The block's input needs a gradient too, as in the middle of a network.
        "hidden_states": torch.randn(1, size, 1280, device=device, requires_grad=True),
        "encoder_hidden_states": torch.randn(1, 77, 2048, device=device),
    }


def _flux_block() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)


def _flux_tokens(size: int, device: torch.device) -> Inputs:
    text = size // 8
    return {
        "hidden_states": torch.randn(1, size - text, 3072, device=device, requires_grad=True),
        "encoder_hidden_states": torch.randn(1, text, 3072, device=device, requires_grad=True),
        "temb": torch.randn(1, 3072, device=device),
    }


_VIT_LAYERS = (r"blocks\.\d+\.attn\.(qkv|proj)", r"blocks\.\d+\.mlp\.fc[12]")

WORKLOADS: dict[str, Workload] = {
    "vit_s": Workload(
        "ViT-S/16", "images", (1, 4, 16, 64), _vit("vit_small_patch16_224"), _images, mean_square, *_VIT_LAYERS
    ),
    "vit_s_few": Workload(
        "ViT-S/14 of 28 x 28 pixels",
        "images",
        (1, 4, 16, 64),
        _vit("vit_small_patch16_224", img_size=28, patch_size=14),
        partial(_images, side=28),
        mean_square,
        *_VIT_LAYERS,
    ),
    "vit_narrow": Workload(  # the operations of ViT-S with numbers of bases as at rank 32, on almost no numbers
        "ViT of width 24",
        "images",
        (),
        _vit("vit_small_patch16_224", img_size=28, patch_size=14, embed_dim=24),
        partial(_images, side=28),
        mean_square,
        *_VIT_LAYERS,
        rank=2,
    ),
    "vit_b": Workload(
        "ViT-B/16", "images", (1, 4, 16, 64), _vit("vit_base_patch16_224"), _images, mean_square, *_VIT_LAYERS
    ),
    "vit_l": Workload("ViT-L/16", "images", (64,), _vit("vit_large_patch16_224"), _images, mean_square, *_VIT_LAYERS),
    "clip_b": Workload(
        "CLIP ViT-B/32, both towers",
        "pairs",
        (16, 64),
        _clip,
        _pairs,
        _clip_loss,
        r".*\.self_attn\.(q|k|v|out)_proj",
        r".*\.mlp\.fc[12]",
    ),
    "sdxl_block": Workload(
        "SDXL transformer block",
        "tokens",
        (512, 4096),
        _sdxl_block,
        _sdxl_tokens,
        mean_square,
        r"attn[12]\.to_(q|k|v|out\.0)",
        r"ff\.net\..*",
    ),
    "flux_block": Workload(
        "Flux single block", "tokens", (512, 4096), _flux_block, _flux_tokens, mean_square, r"attn\.to_.*", r"proj_.*"
    ),
}
