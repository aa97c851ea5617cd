"""The presets on every family of timm: adapters act, train, merge, are removed and are saved with their head.

One model of each family goes all the way once; what its head and its other forms change is checked on shapes alone.
The reference outputs come from the frozen base: see test_zoo.py.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, plan, remove, save_adapter, unmerge
from randlora_vision.integrations import timm as integration
from tests.layers.test_zoo import MOVED, SAME, assert_same, difference, draw, is_rounding, snapshot
from tests.layers.test_zoo import one_thread as one_thread
from tests.timm_families import FAMILIES, Family, build, images, shapes_of
from tests.zoo.base import reading


def families(*chosen: Family) -> pytest.MarkDecorator:
    marks = {True: [pytest.mark.slow], False: []}
    return pytest.mark.parametrize("family", [pytest.param(f, id=f.id, marks=marks[f.slow]) for f in chosen])


every_family = families(*FAMILIES)
OWN_FEATURES = ("pit", "efficientnet", "mobilenetv4")  # other classes of feature models than all the rest


def config(family: Family, **settings: Any) -> RandLoRAConfig:
    """The widest preset; the others choose a subset of its targets."""
    return RandLoRAConfig(rank=family.rank, **{"target_modules": "timm:conv", **settings})


def frozen(family: Family, **changes: Any) -> nn.Module:
    return build(family, **changes).requires_grad_(False)


def trained(family: Family, **changes: Any) -> nn.Module:
    """A frozen base with an adapter that acts."""
    model = frozen(family, **changes)
    inject(model, config(family))
    draw(model)
    return model


def run(family: Family, model: nn.Module) -> Tensor:
    """The logits, or the features of a model without a classifier."""
    return model(images(family, model))


@every_family
@torch.no_grad()
def test_presets_nest_and_leave_classifier_and_stem_alone(family: Family) -> None:
    model = shapes_of(family)
    backbone, attention, conv = (integration.PRESETS[name](model) for name in ("backbone", "attention", "conv"))
    assert backbone and set(backbone) <= set(conv) and set(attention) <= set(conv)
    assert len(set(conv)) == len(conv)
    modules = dict(model.named_modules())
    convolutions = [name for name in conv if isinstance(modules[name], nn.Conv2d)]
    assert all(modules[name].groups == 1 for name in convolutions)
    heads = integration.head_modules(model)
    assert heads and modules.keys() >= set(heads)
    inside = tuple(f"{head}." for head in heads)
    assert not [
        name for name in modules if name.endswith(tuple(f".{h}" for h in heads)) and not name.startswith(inside)
    ]
    outside = [*heads, *stems(model)]
    assert not [name for name in conv if any(f"{name}.".startswith(f"{path}.") for path in outside)]
    check_other_forms(family, model, conv)


def check_other_forms(family: Family, model: nn.Module, places: list[str]) -> None:
    """Without a classifier, and as a model of features, the same layers are chosen, as far as they exist."""
    headless = shapes_of(family, num_classes=0)
    assert integration.head_modules(headless) == []
    assert [target.name for target in plan(headless, config(family)).targets] == places
    features = plan(shapes_of(family, features_only=True, out_indices=(-1,)), config(family)).targets
    whole = Counter(target.shape for target in plan(model, config(family)).targets)
    assert features and Counter(target.shape for target in features) <= whole  # some have other names


def stems(model: nn.Module) -> list[str]:
    """The modules that read the pixels, according to timm's configuration."""
    names = model.pretrained_cfg["first_conv"]
    return [names] if isinstance(names, str) else list(names)


@families(*(family for family in FAMILIES if family.unreachable))
def test_unreachable_weights_are_so_in_the_base(family: Family) -> None:
    base = build(family).double().requires_grad_(True)
    reading(run(family, base)).backward()
    gradients = {name: base.get_parameter(f"{name}.weight").grad for name in integration.conv_targets(base)}
    largest = max(g.abs().max().item() for g in gradients.values() if g is not None)
    dead = {name for name, g in gradients.items() if is_rounding(g, largest)}
    assert dead == {name for name in gradients if family.cannot_reach(name)}


@every_family
@torch.no_grad()
def test_an_adapter_from_injection_to_removal(family: Family, tmp_path: Path) -> None:
    """One model all the way, so that what one step leaves behind shows in the next."""
    model = build(family)
    before, base = snapshot(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reference = run(family, model)
    settings = config(family, modules_to_save=integration.head_modules(model))
    inside = tuple(f"{head}." for head in settings.modules_to_save)
    report = inject(model, settings)
    assert not [target.name for target in report.targets if f"{target.name}.".startswith(inside)]
    assert difference(run(family, model), reference) < SAME
    draw(model)
    assert [key for key in model.state_dict() if "_randlora_" not in key] == list(base)
    apart = run(family, model)
    assert difference(apart, reference) > MOVED
    check_gradients(family, model.double(), inside, len(report.targets))
    model.float()
    other = frozen(family)
    check_merged(family, model, other, apart, base)
    check_classifier(family, model, other, inside, tmp_path / "adapter.safetensors")
    remove(model)
    assert_same(snapshot(model), before)


@torch.enable_grad()
def check_gradients(family: Family, model: nn.Module, inside: tuple[str, ...], targets: int) -> None:
    """Every adapter learns that can."""
    reading(run(family, model)).backward()
    parameters = {name: p for name, p in adapter_parameters(model) if not name.startswith(inside)}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    assert len(parameters) == 2 * targets
    assert [name for name, g in gradients.items() if g is not None and not g.isfinite().all()] == []
    largest = max(g.abs().max().item() for g in gradients.values() if g is not None)
    dead = {name for name, g in gradients.items() if is_rounding(g, largest)}
    assert dead == {name for name in parameters if family.cannot_reach(name)}


def check_merged(family: Family, model: nn.Module, plain: nn.Module, apart: Tensor, base: dict[str, Tensor]) -> None:
    """The merged weights are those of a plain model, which gets its own back."""
    merge(model)
    merged = run(family, model)
    assert difference(merged, apart) < SAME
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in base})
    assert torch.equal(run(family, plain), merged)
    plain.load_state_dict(base)
    unmerge(model)
    assert torch.equal(run(family, model), apart)


def check_classifier(family: Family, model: nn.Module, other: nn.Module, inside: tuple[str, ...], path: Path) -> None:
    """The classifier is trained, and is in the file."""
    classifier = {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in classifier.values())
    for parameter in classifier.values():
        parameter -= 0.1 * parameter.grad
    save_adapter(model, path)
    assert integration.num_classes(path) == model.num_classes
    integration.load_adapter(other, path)
    assert torch.equal(run(family, other), run(family, model))


@families(*(f for number, f in enumerate(FAMILIES) if number % 6 == 0 or f.id in OWN_FEATURES))
@torch.no_grad()
def test_feature_maps_show_the_adapter(family: Family) -> None:
    model = frozen(family, features_only=True, out_indices=(-1,))
    (reference,) = model(images(family, model))
    inject(model, config(family))
    draw(model)
    (adapted,) = model(images(family, model))
    assert adapted.shape == reference.shape
    assert difference(adapted, reference) > MOVED
    merge(model)
    (merged,) = model(images(family, model))
    assert difference(merged, adapted) < SAME
    unmerge(model)
    remove(model)
    (after,) = model(images(family, model))
    assert torch.equal(after, reference)
