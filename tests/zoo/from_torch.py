"""torch and torchvision: attention modules, fast paths, shared weights and the odd layers."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.base import Entry, Run, entry, flat, numbers, tokens

SIZE, WIDTH = 32, 16


class SelfAttention(nn.Module):
    """A bare nn.MultiheadAttention, with another width of keys and values where asked."""

    def __init__(self, kdim: int | None = None, vdim: int | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=kdim, vdim=vdim, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flat(*(output for output in self.attention(query, key, value) if output is not None))


class Tied(nn.Module):
    """Two Linears with one Parameter, used at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class TiedHead(nn.Module):
    """A language model whose `lm_head` is its embedding: an update of the one would move the other."""

    def __init__(self, vocabulary: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.lm_head(x + self.down(self.up(x).tanh()))


class SharedModule(nn.Module):
    """One Linear under two parents: one adapter, two names."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Sequential(shared, nn.Tanh(), nn.Linear(WIDTH, 8))
        self.right = nn.Sequential(nn.Linear(WIDTH, WIDTH), shared)

    def forward(self, x: Tensor) -> Tensor:
        return flat(self.left(x), self.right(x))


class Experts(nn.Module):
    """A mixture of experts routed by position: the last expert gets no token."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        routed = x.new_zeros(x.shape)
        chosen = torch.arange(x.shape[0]) % (len(self.experts) - 1)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            routed = routed.index_add(0, rows, gates[rows, index, None] * expert(x[rows]))
        return routed


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=2, dilation=2, padding="valid", padding_mode="zeros"),
        nn.Conv2d(32, 16, 3, padding="same", padding_mode="reflect"),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(8, 8, 3),
        nn.Unflatten(1, (1, 8)),
        nn.Unflatten(3, (2, -1)),
        nn.Conv3d(1, 4, (3, 1, 3)),
    )


def weight_norm() -> nn.Module:
    from torch.nn.utils.parametrizations import weight_norm

    return nn.Sequential(weight_norm(nn.Linear(WIDTH, 32)), nn.GELU(), nn.Linear(32, WIDTH))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(), torch.no_grad():  # with a graph it could not be copied
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        normed = torch.nn.utils.weight_norm(nn.Linear(WIDTH, 32))
    return nn.Sequential(normed, nn.GELU(), nn.Linear(32, WIDTH))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 12))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, **options)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(batch_first=True), 2)


def transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 2, 1, 2, 32, batch_first=True)


def vision_vit(**sizes: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(**sizes)


def vision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    return SwinTransformer(**sizes, num_classes=8, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def vision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=8)


def vision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1])
    # Cut after two stages: the others are the same again, twenty times the size.
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 8)
    return model


def feed(*shapes: tuple[int, ...]) -> Run:
    return lambda model: model(*(numbers(model, *shape) for shape in shapes)).flatten()


def module(
    name: str, make: Callable[..., nn.Module], run: Run, options: dict[str, Any] | None = None, **zoo: Any
) -> Entry:
    return entry(f"torch/{name}", partial(make, **(options or {})), run, **zoo)


# fmt: off
SEQUENCE, ROWS, IMAGE = (2, 5, WIDTH), (6, WIDTH), (2, 3, SIZE, SIZE)
VIT = dict(image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=32, num_classes=8)
FIRST = dict(batch_first=True)

ENTRIES = [
    module("mlp", mlp, feed(ROWS)),
    module("attention", SelfAttention, feed(SEQUENCE, SEQUENCE, SEQUENCE), FIRST),
    module("attention_no_bias", SelfAttention, feed(SEQUENCE, SEQUENCE, SEQUENCE), dict(bias=False, add_bias_kv=True)),
    module("attention_kdim", SelfAttention, feed(SEQUENCE, (2, 5, 24), (2, 5, 12)), dict(FIRST, kdim=24, vdim=12)),
    module("encoder", encoder, feed(SEQUENCE)),
    module("encoder_layer", encoder_layer, feed(SEQUENCE), dict(FIRST, norm_first=True)),
    module("encoder_layer_seq_first", encoder_layer, feed(SEQUENCE)),
    module("transformer", transformer, feed(SEQUENCE, (2, 4, WIDTH))),
    module("tied", Tied, feed(ROWS)),
    module("tied_head", TiedHead, lambda model: model(tokens(2, 5)).flatten()),
    module("tied_head_all", TiedHead, lambda model: model(tokens(2, 5)).flatten(), target="all"),
    module("shared_module", SharedModule, feed(ROWS)),
    module("experts", Experts, feed(ROWS), unreachable=(r"^experts\.4\.weight",)),
    module("conv_net", conv_net, feed((2, 3, 11, 11)), target="all"),
    module("weight_norm", weight_norm, feed(ROWS)),
    module("old_weight_norm", old_weight_norm, feed(ROWS)),
    module("vision_vit", vision_vit, feed(IMAGE), VIT),
    module("vision_swinv2", vision_swin, feed(IMAGE)),
    module("vision_resnet", vision_resnet, feed(IMAGE), target="all"),
    module("vision_convnext", vision_convnext, feed(IMAGE), target="all"),
]
# fmt: on
