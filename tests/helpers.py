"""What the tests compare with: the dense matrix of the paper's formula, written out, and small models.

Shapes: O out, I in, M wide side, m narrow side, R rank, N bases.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from randlora_vision import InjectionReport, adapter_parameters
from randlora_vision.bases import generate

IMAGES = (2, 3, 16, 16)


def dense_delta(
    lam: Tensor, gamma: Tensor, shape: tuple[int, int], scale: float, kind: str, seed: int, density_side: int
) -> Tensor:
    """``s * sum_n B_n diag(lambda_n) A diag(gamma_n)`` (O, I) in float64, differentiable in lambda and gamma.

    Column k * N + n of B is column k of the paper's B_n (PEFT's order).
    """
    rank, bases = lam.shape
    wide, narrow = max(shape), min(shape)
    a = generated(kind, seed, 0, rank, narrow, density_side)
    b = generated(kind, seed, 1, wide, rank * bases, density_side).unflatten(1, (rank, bases))
    total = torch.einsum("orn,rn,ri,ni->oi", b, lam.double(), a, gamma.double())
    return scale * (total if shape[0] >= shape[1] else total.T)


@functools.lru_cache(maxsize=256)
def generated(kind: str, seed: int, matrix: int, rows: int, columns: int, density_side: int) -> Tensor:
    """One of the random matrices, in float64."""
    return torch.from_numpy(generate(kind, seed, matrix, rows, columns, density_side)).double()


def parameter_path(base: nn.Module, target: str) -> str:
    """The parameter that a report calls `target`."""
    owner, _, name = target.rpartition(".")
    is_parameter = name in dict(base.get_submodule(owner).named_parameters(recurse=False))
    return target if is_parameter else f"{target}.weight".lstrip(".")


def dense_weights(
    base: nn.Module, trained: dict[str, Tensor], report: InjectionReport, scale: float = 1.0
) -> dict[str, Tensor]:
    """Parameter path -> W + delta W in float64, from a state dict with lambda and gamma of the report's adapter."""
    weights = {}
    side = max(target.narrow for target in report.targets)
    for target in report.targets:
        path = parameter_path(base, target.name)
        lam, gamma = (trained[f"{path}_randlora_{part}_{report.adapter_name}"] for part in ("lambda", "gamma"))
        config = report.config
        s = scale * target.alpha / target.rank
        delta = dense_delta(lam, gamma, target.shape, s, config.bases, config.seed, side)
        weight = base.get_parameter(path).detach().double()
        weights[path] = weight + delta.reshape(weight.shape)
    return weights


def dense_model(base: nn.Module, adapted: nn.Module, *reports: InjectionReport) -> nn.Module:
    """A float64 copy of the plain base whose weights are W + the sum of the reports' dense updates."""
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for report in reports:
            for path, weight in dense_weights(model, adapted.state_dict(), report).items():
                model.get_parameter(path).copy_(weight)
    return model


def randomize(model: nn.Module, adapter_name: str | None = None, seed: int = 0) -> None:
    """Give lambda and gamma values that move the output about as much as the base weights do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, adapter_name):
            size = 0.1 if name.endswith("lambda") else 1 / parameter.shape[1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that an operation which must not touch the model could touch."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "types": {path: type(module) for path, module in modules.items()},
        "attributes": {path: sorted(module.__dict__) for path, module in modules.items()},
        "tensors": {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()},
        "bytes": {name: tensor_bytes(tensor) for name, tensor in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {path: module.training for path, module in modules.items()},
    }


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's dtype, shape and bits."""
    if tensor.is_meta:
        return f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + bits


def mlp(seed: int = 0) -> nn.Sequential:
    """8 -> 16 -> 6: a wide and a tall linear layer, called "0" and "2"."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 6))


def vit(depth: int = 2, width: int = 32, classes: int = 5, seed: int = 0) -> nn.Module:
    """A small stock timm ViT for `IMAGES`, in eval mode."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=classes)
    return model.eval()


def clip(seed: int = 0) -> nn.Module:
    """A small stock open_clip CLIP for `IMAGES` and 8 tokens of a vocabulary of 32, in eval mode."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=8, vocab_size=32, width=32, heads=2, layers=2)
    return CLIP(16, vision, text).eval()
