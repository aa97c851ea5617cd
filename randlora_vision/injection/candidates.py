"""The parameters of a model that can be adapted.

A target is a (module, parameter) pair, or several pairs if the parameter is tied. Its name is the path of the module
if the parameter is a layer's ``weight``, otherwise the path of the parameter
(``visual.transformer.resblocks.0.attn.in_proj_weight``).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from randlora_vision.layers.adapted import ATTENTION_PARAMETERS, CONVOLUTIONS, is_quantized, own_parameters
from randlora_vision.layers.peft_around import plain_modules
from randlora_vision.names import matches_suffix, with_parents
from randlora_vision.report import Target

LINEAR, TRANSPOSED, ATTENTION, CONVOLUTION, PARAMETER, QUANTIZED = (
    "linear",
    "transposed",
    "attention",
    "convolution",
    "parameter",
    "quantized",
)
LINEAR_KINDS = (LINEAR, TRANSPOSED, ATTENTION, QUANTIZED)
# Path components that denote the classifier or a task head in timm, torchvision, transformers and open_clip.
_HEAD_NAMES = frozenset(
    "head heads head_dist classifier cls_classifier distillation_classifier classification_head lm_head "
    "score class_labels_classifier bbox_predictor qa_outputs pre_logits decode_head auxiliary_head".split()
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A parameter that can be adapted, or one that cannot, with the reason."""

    name: str
    aliases: tuple[str, ...]  # its names under other parents, and those of tied parameters
    paths: tuple[str, ...]  # that a pattern may match: of the module and of the parameter, with aliases
    owners: tuple[tuple[nn.Module, str], ...]  # (module, parameter name), several if it is tied
    kind: str
    shape: tuple[int, int] | None  # (O, I), with convolution kernels flattened into I; None if unknown
    problem: str | None  # why it cannot be adapted
    head: bool  # whether it belongs to a classifier or task head

    def target(self, rank: int, alpha: float) -> Target:
        """Return the report's entry for an adapter of this rank and alpha."""
        assert self.shape is not None
        bases = math.ceil(min(self.shape) / rank)
        return Target(self.name, self.kind, self.shape, rank, alpha, bases, self.aliases)


class _Tree:
    """Indexes for finding candidates: modules by path and by identity, the owners of each parameter, the heads."""

    def __init__(self, model: nn.Module) -> None:
        self.by_path = dict(plain_modules(model))
        self.paths: dict[int, list[str]] = {}
        for path, module in self.by_path.items():
            self.paths.setdefault(id(module), []).append(path)
        self.modules = list(dict.fromkeys(self.by_path.values()))
        self.uses: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.modules:
            for name, parameter in _parameters(module).items():
                if parameter is not None:
                    self.uses.setdefault(id(parameter), []).append((module, name))
        self.heads = self._head_roots()

    def _head_roots(self) -> set[str]:
        """Paths of classifiers and task heads, found by name and with timm's `get_classifier`."""
        roots = {path for path in self.by_path if path.rpartition(".")[2] in _HEAD_NAMES or path == "fc"}
        # SigLIP's attention pooling is called `head`, but it is not a classifier.
        roots = {
            root
            for root in roots
            if not any(f"{p}.".startswith(f"{root}.") and _holds_attention(m) for p, m in self.by_path.items())
        }
        for module in self.modules:
            if not hasattr(type(module), "get_classifier"):  # the modules inside a wrapper are here too
                continue
            try:
                classifier = module.get_classifier()  # type: ignore[operator]
            except (AttributeError, NotImplementedError, TypeError):
                continue
            found = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
            for head in found:
                roots.update(path for path in self.paths.get(id(head), ()) if path)
        return roots

    def in_head(self, path: str) -> bool:
        """True for a head and for everything inside one."""
        return any(parent in self.heads for parent in with_parents((path,)))

    def in_attention(self, path: str) -> bool:
        """True for the output projection of an attention module that holds a packed projection."""
        parent, _, last = path.rpartition(".")
        return last == "out_proj" and _holds_attention(self.by_path[parent])


def candidates(model: nn.Module) -> list[Candidate]:
    """Every candidate of a model in module order, with tied parameters listed once."""
    tree = _Tree(model)
    found: list[Candidate] = []
    seen: set[int] = set()
    for module in tree.modules:
        for param, kind in _own_parameters(module):
            raw = _parameters(module).get(param)
            if raw is None or id(raw) not in seen:
                seen.add(id(raw))
                found.append(_candidate(module, param, kind, tree))
    return found


def described(model: nn.Module, name: str) -> str | None:
    """What the first module, parameter or buffer of this name is ("is of type Embedding"), or None if there is none."""
    for path, module in plain_modules(model):
        if path and matches_suffix(name, path):
            empty = next(module.parameters(), None) is None
            return f"is of type {type(module).__name__}" + (" and has no parameters" if empty else "")
        for what, table in (("parameter", _parameters(module)), ("buffer", module._buffers)):
            for own, tensor in table.items():
                if tensor is not None and matches_suffix(name, f"{path}.{own}".lstrip(".")):
                    return f"is a {what} of shape {tuple(tensor.shape)}"
    return None


def _candidate(module: nn.Module, param: str, kind: str, tree: _Tree) -> Candidate:
    raw = _parameters(module).get(param)
    others = [] if raw is None else [use for use in tree.uses[id(raw)] if use != (module, param)]
    owners = [(module, param), *others]
    names: list[str] = []
    patterns: list[str] = []
    for owner, owned in owners:
        for path in tree.paths[id(owner)]:
            full = f"{path}.{owned}" if path else owned
            names.append(path if owned == "weight" and path else full)
            patterns.append(full)
            if kind == ATTENTION:
                patterns.append(path)
            elif tree.in_attention(path):
                patterns.append(path.rpartition(".")[0])
    shape, problem = _shape_and_problem(module, param, kind, raw)
    unsupported = [owner for owner, owned in others if owned not in dict(_own_parameters(owner))]
    if unsupported and problem is None:
        path = tree.paths[id(unsupported[0])][0]
        problem = f"it is tied to {path!r} ({type(unsupported[0]).__name__}), which cannot be adapted with it"
    paths = tuple(dict.fromkeys(name for name in (*names, *patterns) if name))
    head = all(tree.in_head(path) for path in tree.paths[id(module)])
    return Candidate(names[0], tuple(names[1:]), paths, tuple(owners), kind, shape, problem, head)


def _shape_and_problem(
    module: nn.Module, param: str, kind: str, raw: nn.Parameter | None
) -> tuple[tuple[int, int] | None, str | None]:
    if isinstance(module, torch.jit.ScriptModule):
        return None, "a TorchScript module cannot be changed"
    if kind == QUANTIZED:
        return (int(module.out_features), int(module.in_features)), None  # type: ignore[arg-type]
    if isinstance(raw, nn.parameter.UninitializedParameter):
        return None, "its weight is not initialised yet: run one batch through the lazy module first"
    tensor = raw
    if tensor is None:
        if not parametrize.is_parametrized(module, param):
            return None, _no_parameter(module, param)
        with torch.no_grad():
            tensor = getattr(module, param)
    assert tensor is not None
    if tensor.ndim < 2 or tensor.numel() == 0:
        return None, f"its {param} of shape {tuple(tensor.shape)} is not a matrix"
    if not tensor.is_floating_point():
        return None, f"its {param} has dtype {tensor.dtype}"
    return (tensor.shape[0], math.prod(tensor.shape[1:])), None


def _no_parameter(module: nn.Module, param: str) -> str:
    """Why a layer does not hold its weight as a parameter."""
    hooks = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    what = next((name for name in ("WeightNorm", "SpectralNorm") if name in hooks), None)
    if what is not None:
        modern = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}[what]
        return (
            f"old-style {modern} computes its {param} in a hook: use torch.nn.utils.parametrizations.{modern}, or call "
            f"torch.nn.utils.remove_{modern} first"
        )
    if f"{param}_orig" in module._parameters:
        return f"pruning computes its {param} in a hook: call torch.nn.utils.prune.remove first"
    return f"it has no parameter {param!r}"


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (parameter name, kind) of each parameter of the module itself that could be adapted."""
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name == "Linear":
            yield "weight", LINEAR
    elif isinstance(module, nn.Linear):
        yield "weight", QUANTIZED if is_quantized(module) else LINEAR
    elif isinstance(module, _transformers_conv1d()):
        yield "weight", TRANSPOSED
    elif isinstance(module, CONVOLUTIONS):
        yield "weight", CONVOLUTION
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)):
        return
    else:
        own = own_parameters(module)
        for name in (*own, *getattr(module, "parametrizations", ())):
            if name in ATTENTION_PARAMETERS:
                if own.get(name) is not None or name not in own:
                    yield name, ATTENTION
            elif getattr(own.get(name), "ndim", 0) == 2:
                yield name, PARAMETER


def _parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's parameters without adapters; empty for a TorchScript module, which has no such table."""
    return {} if isinstance(module, torch.jit.ScriptModule) else own_parameters(module)


def _transformers_conv1d() -> tuple[type, ...]:
    """Conv1D of transformers, a linear layer with a transposed weight, if transformers has been imported."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded is not None else ()


def _holds_attention(module: nn.Module) -> bool:
    """True for a module that itself holds packed or separate attention projections."""
    return any(kind == ATTENTION for _, kind in _own_parameters(module))
