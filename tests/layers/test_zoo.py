"""Every model of the zoo through an adapter's whole life: plan, start, training, merging, files, removal.

The promises are the same for all hosts, so no test here knows one. References are taken from the frozen base in the
same grad mode: freezing alone moves nn.MultiheadAttention's output, which takes another kernel then.

Of the models of a library whose adapted layers have the same classes and are called, or read, alike, the first goes
through merging and files as well; torch's own all do.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import (
    InjectionReport,
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    disabled,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
    set_active,
    set_scale,
    unmerge,
)
from tests.zoo import ZOO, Entry, reading

pytestmark = [
    pytest.mark.parametrize(
        "entry", [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.slow else []) for e in ZOO]
    ),
    # Caused by the hosts: Chroma imports from a module that diffusers moved, Mochi asks for autocast in float32.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]

PROJECTIONS = (nn.Linear, nn.MultiheadAttention)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRIX = re.compile(r"weight|\w+_proj_weight")

# Below this share of the largest gradient a float64 gradient is rounding.
ROUNDING = 1e-12
# Other kernels and orders of summation, through a whole model in float32.
SAME = 5e-6
# The random adapters move every model by a tenth at least.
MOVED = 1e-2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small spend most of their time on thread overhead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(entry: Entry) -> RandLoRAConfig:
    return RandLoRAConfig(rank=entry.rank, target_modules=entry.target)


def frozen(entry: Entry) -> nn.Module:
    return entry.build().requires_grad_(False)


def trained(entry: Entry) -> nn.Module:
    """A frozen base with an adapter that has an effect."""
    model = frozen(entry)
    inject(model, config(entry))
    draw(model)
    return model


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Give every adapter tensor that starts at zero random numbers, as training would."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter_parameters(model):
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def difference(output: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((output - reference).abs().max() / reference.abs().max()).item()


def matrices(model: nn.Module, target: str) -> dict[str, tuple[nn.Parameter, set[str]]]:
    """The parameters that can be adapted, with all their names, found without the library."""
    kinds = PROJECTIONS + CONVOLUTIONS if target == "all" else PROJECTIONS
    names: dict[nn.Parameter, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            asked = isinstance(module, kinds) or type(module).__name__ == "Conv1D"  # transformers' transposed Linear
            packed = name == "in_proj_weight"  # of open_clip's own Attention too
            if packed or (asked and MATRIX.fullmatch(name)):
                names.setdefault(parameter, set()).add(f"{path}.{name}".lstrip("."))
    return {min(found): (parameter, found) for parameter, found in names.items()}


def is_unreachable(entry: Entry, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in entry.unreachable)


def is_rounding(gradient: Tensor | None, largest: float) -> bool:
    return gradient is None or gradient.abs().max().item() <= ROUNDING * largest


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that `remove` must restore, in a comparable form: with it, the output is restored too."""
    return {
        "types": {path: type(module) for path, module in model.named_modules(remove_duplicate=False)},
        "attributes": {path: attributes(module) for path, module in model.named_modules()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "objects": {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)},
        "tensors": {name: (tensor.dtype, bits(tensor)) for name, tensor in model.state_dict().items()},
    }


def attributes(module: nn.Module) -> dict[str, int | None]:
    """The names of a module's attributes, with the numbers of hooks; models keep caches in public dictionaries."""
    hooks = {name for name, value in vars(module).items() if name.startswith("_") and isinstance(value, dict)}
    return {name: len(value) if name in hooks else None for name, value in vars(module).items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    for part, expected in before.items():
        changed = {key for key in now[part].keys() | expected.keys() if now[part].get(key) != expected.get(key)}
        assert not changed, f"{part} differ"


def test_entry_sees_all_of_its_model(entry: Entry) -> None:
    model = entry.build().double().requires_grad_(True)
    output = entry.run(model)
    reading(output).backward()
    found = matrices(model, entry.target)
    largest = max(parameter.grad.abs().max().item() for parameter, _ in found.values() if parameter.grad is not None)
    unreached = {name for name, (parameter, _) in found.items() if is_rounding(parameter.grad, largest)}
    assert unreached == {name for name in found if is_unreachable(entry, name)}
    stale = [pattern for pattern in entry.unreachable if not any(re.search(pattern, name) for name in unreached)]
    assert not stale
    assert output.isfinite().all()


def test_plan_tells_what_inject_does_and_touches_nothing(entry: Entry) -> None:
    model = entry.build()
    before = snapshot(model)
    planned = plan(model, config(entry))
    assert_same(snapshot(model), before)
    told = {name for target in planned.targets for name in (target.name, *target.aliases)}
    told |= {name for name, _ in planned.skipped}
    asked = {name.removesuffix(".weight") for _, names in matrices(model, entry.target).values() for name in names}
    assert asked - told == set()  # no projection is lost without a word

    report = inject(model, config(entry))
    assert report == planned
    assert report.targets
    names, parameters = zip(*adapter_parameters(model), strict=True)
    assert len(set(names)) == len({id(parameter) for parameter in parameters}) == len(names) == 2 * len(report.targets)
    assert sum(parameter.numel() for parameter in parameters) == report.num_parameters
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}

    remove(model)  # the base was not frozen
    assert_same(snapshot(model), before)


def test_gradients(entry: Entry) -> None:
    model = trained(entry).double()
    reading(entry.run(model)).backward()
    parameters = dict(adapter_parameters(model))
    reachable = {name: p for name, p in parameters.items() if not is_unreachable(entry, name)}
    assert [name for name, p in reachable.items() if p.grad is None or not p.grad.isfinite().all()] == []
    largest = max(p.grad.abs().max().item() for p in reachable.values())
    assert [name for name, p in reachable.items() if is_rounding(p.grad, largest)] == []
    generator = torch.Generator().manual_seed(0)
    name, parameter = list(reachable.items())[torch.randint(len(reachable), (), generator=generator)]
    assert slope_error(entry, model, parameter, generator) < (0.05 if entry.float32_inside else 1e-5), name


@torch.no_grad()
def slope_error(entry: Entry, model: nn.Module, parameter: nn.Parameter, generator: torch.Generator) -> float:
    """The gradient's slope in a random direction against a central difference, relative to the gradient."""
    assert parameter.grad is not None
    direction = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    direction /= direction.norm()
    step = parameter.norm().item() * (0.05 if entry.float32_inside else 1e-5)
    start = parameter.clone()
    parameter.copy_(start + step * direction)
    above = reading(entry.run(model)).item()
    parameter.copy_(start - step * direction)
    below = reading(entry.run(model)).item()
    parameter.copy_(start)
    slope = (parameter.grad * direction).sum().item()
    return abs((above - below) / (2 * step) - slope) / parameter.grad.norm().item()


def test_an_adapter_from_injection_to_removal(entry: Entry, tmp_path: Path) -> None:
    """One model all the way, so that what one step leaves behind shows in the next."""
    model = frozen(entry)
    reference, before = entry.run(model), snapshot(model)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inject(model, config(entry))
    start, called = run_noting_calls(entry, model)
    assert difference(start, reference) < SAME  # it starts as the base

    draw(model)
    acting = entry.run(model)
    assert acting.requires_grad
    assert difference(acting, reference) > MOVED
    with disabled(model):
        assert torch.equal(entry.run(model), reference)
    if entry.every_switch:
        check_switches(entry, model, reference, acting)
        check_second_adapter(entry, model, acting)
    with torch.no_grad():
        fast = entry.run(model)
    assert difference(fast, acting) < SAME
    first = _first_of_kind.setdefault(signature(entry, model, called), entry.name)
    if first == entry.name or entry.every_switch:
        check_file(entry, model, fast, tmp_path / "adapter.safetensors")
        check_merge(entry, model, base, fast)
    check_base_checkpoints(model, base)

    remove(model)
    assert_same(snapshot(model), before)


_first_of_kind: dict[frozenset[object], str] = {}


def run_noting_calls(entry: Entry, model: nn.Module) -> tuple[Tensor, set[nn.Module]]:
    """The output, and the modules that are called for it."""
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: called.add(module))
    try:
        return entry.run(model), called
    finally:
        handle.remove()


def signature(entry: Entry, model: nn.Module, called: set[nn.Module]) -> frozenset[object]:
    """The library, and which layers have an adapter: class, weight, called or read, and whose code holds them."""
    found: set[object] = {entry.name.split("/")[0], entry.target}
    for name, _ in adapter_parameters(model):
        path, matrix, *_ = f".{name}".rsplit(".", 3)
        module = model.get_submodule(path.lstrip("."))
        holder = type(model.get_submodule(path.rpartition(".")[0].lstrip("."))).__module__.split(".")[0]
        found.add((type(module).__name__, matrix, module in called, holder))
    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    found.add(len(parameters) > len(set(parameters)))  # tied weights
    return frozenset(found)


def check_switches(entry: Entry, model: nn.Module, reference: Tensor, acting: Tensor) -> None:
    set_scale(model, 0.0)
    assert torch.equal(entry.run(model), reference)
    set_scale(model, 1.0)
    set_active(model, [])
    assert torch.equal(entry.run(model), reference)
    set_active(model, "default")
    assert torch.equal(entry.run(model), acting)


def check_second_adapter(entry: Entry, model: nn.Module, first: Tensor) -> None:
    """It adds to the first one, and leaves nothing behind."""
    report = inject(model, config(entry), adapter_name="second")
    assert isinstance(report, InjectionReport) and report.adapter_name == "second"
    draw(model)
    set_active(model, ["default", "second"])
    assert difference(entry.run(model), first) > MOVED
    delete_adapter(model, "second")
    set_active(model, "default")
    assert torch.equal(entry.run(model), first)


@torch.no_grad()
def check_file(entry: Entry, model: nn.Module, output: Tensor, path: Path) -> None:
    """The file gives another base the same bits."""
    save_adapter(model, path)
    other = frozen(entry)
    load_adapter(other, path)
    assert torch.equal(entry.run(other), output)
    loaded = dict(adapter_parameters(other))
    assert loaded.keys() == dict(adapter_parameters(model)).keys()
    assert all(torch.equal(loaded[name], parameter) for name, parameter in adapter_parameters(model))


def check_merge(entry: Entry, model: nn.Module, base: dict[str, Tensor], apart: Tensor) -> None:
    """The merged weights are those of a plain model; `apart` is the output before, without gradients."""
    before = snapshot(model)
    merge(model)
    with torch.no_grad():
        merged = entry.run(model)
        assert difference(merged, apart) < SAME
        plain = frozen(entry)
        plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in base})
        assert torch.equal(entry.run(plain), merged)
    unmerge(model)
    assert_same(snapshot(model), before)


def check_base_checkpoints(model: nn.Module, base: dict[str, Tensor]) -> None:
    """They load as into the base."""
    adapted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert base.keys() <= adapted.keys()
    assert all(torch.equal(adapted[key], tensor) for key, tensor in base.items())
    changed = {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in base.items()}
    model.load_state_dict(changed, strict=True)
    loaded = model.state_dict()
    for key, tensor in adapted.items():
        assert torch.equal(loaded[key], changed.get(key, tensor)), key
    model.load_state_dict(base, strict=True)
