"""PEFT's own models and folders, which the interchange tests compare with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn


class Named(nn.Module):
    """Layers of every shape: tall, wide, square, and one far narrower than the rest; a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(12, 20)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(20, 20), "out": nn.Linear(20, 20)}) for _ in "abc")
        self.wide = nn.Linear(20, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.tall(x))
        for block in self.blocks:
            x = x + torch.tanh(block["out"](torch.tanh(block["fc"](x))))
        return self.head(self.norm(self.wide(x)))


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=16, embed_dim=32, num_blocks=2, num_classes=0)


def gpt2() -> nn.Module:
    """Conv1D layers, which store their weight transposed; c_proj of the attention is square."""
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=16, n_positions=8, n_embd=24, n_layer=2, n_head=2, n_inner=40))


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, num_labels=4))


def torch_encoder() -> nn.Module:
    """Of an activation that keeps torch off its fast path, on which PEFT's adapters are lost."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation=torch.tanh, batch_first=True)
    return nn.Sequential(nn.Linear(12, 16), layer, nn.Linear(16, 3))


IMAGE = (3, 3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "named": (Named, lambda: torch.randn(6, 12)),
    "vit": (vit, lambda: torch.randn(IMAGE)),
    "mixer": (mixer, lambda: torch.randn(IMAGE)),
    "gpt2": (gpt2, lambda: torch.arange(8).reshape(1, 8)),
    "hf_vit": (hf_vit, lambda: torch.randn(IMAGE)),
    "torch_encoder": (torch_encoder, lambda: torch.randn(2, 4, 12)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """(the base model, an input), the same at every call."""
    make, example = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), example()


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """The output tensor, in float32 at least and without a gradient."""
    with torch.no_grad():
        out = model(x)
    if not isinstance(out, Tensor):
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return out


def trained(base: nn.Module, **settings: Any) -> peft.PeftModel:
    """PEFT's model on a copy of `base`, whatever it trains moved away from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on save_projection=False and fan_in_fan_out
        config = peft.RandLoraConfig(**{"r": 5, "randlora_alpha": 15, **settings})
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    move(model)
    return model


def move(model: peft.PeftModel, seed: int = 1) -> None:
    """Give everything that PEFT trains other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.05 if "lambda" in name else 0.3 * float(parameter.abs().max())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * max(size, 0.05))


def folder(path: Path, model: peft.PeftModel) -> Path:
    """What `save_pretrained` writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def load_peft(base: nn.Module, path: Path) -> peft.PeftModel:
    """PEFT's own loader on a copy of `base`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()
