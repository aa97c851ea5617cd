"""Choosing targets, planning and injecting: exactly what a configuration asks for is adapted."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.operations import python_calls
from randlora_vision import (
    InjectionReport,
    RandLoRAConfig,
    adapter_parameters,
    count_parameters,
    delete_adapter,
    inject,
    merge,
    plan,
    remove,
    save_adapter,
    unmerge,
)
from randlora_vision.layers.adapted import AdaptedModule, base_parameters
from tests.helpers import IMAGES, clip, dense_model, mlp, randomize, snapshot, vit


def names(report: InjectionReport) -> set[str]:
    return {target.name for target in report.targets}


def chosen(model: nn.Module, **options: object) -> set[str]:
    return names(plan(model, RandLoRAConfig(**{"rank": 4, **options})))  # type: ignore[arg-type]


def block(*layers: str, depth: int = 2) -> set[str]:
    return {f"blocks.{i}.{layer}" for i in range(depth) for layer in layers}


# What a configuration selects.


def test_names_match_whole_trailing_components() -> None:
    model = vit()
    assert chosen(model, target_modules=["qkv"]) == block("attn.qkv")
    assert chosen(model, target_modules=["attn.proj"]) == block("attn.proj")
    assert chosen(model, target_modules=["proj"]) == block("attn.proj") | {"patch_embed.proj"}
    assert chosen(model, target_modules=["blocks.1.mlp.fc1", "head"]) == {"blocks.1.mlp.fc1", "head"}
    with pytest.raises(ValueError, match="leaves nothing to adapt"):
        plan(model, RandLoRAConfig(rank=4, target_modules=["roj"]))
    with pytest.raises(ValueError, match="leaves nothing to adapt"):
        plan(model, RandLoRAConfig(rank=4, target_modules=["mlp", "blocks"]))


def test_a_regular_expression_matches_a_whole_path() -> None:
    model = vit()
    assert chosen(model, target_modules=r"blocks\.1\..*fc\d") == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    with pytest.raises(ValueError, match="leaves nothing to adapt"):
        plan(model, RandLoRAConfig(rank=4, target_modules=r"blocks\.1"))


def test_exclusion_by_any_run_of_components_or_expression() -> None:
    model = vit()
    everything = block("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert chosen(model, exclude_modules=["mlp"]) == block("attn.qkv", "attn.proj")
    assert chosen(model, exclude_modules=["blocks.0"]) == {name for name in everything if "blocks.1" in name}
    assert chosen(model, exclude_modules=["attn.pro", "lp.fc1", "block"]) == everything
    assert chosen(model, exclude_modules=r".*\.fc2") == everything - block("mlp.fc2")
    assert chosen(model, exclude_modules=r"\.fc2") == everything
    report = plan(model, RandLoRAConfig(rank=4, exclude_modules=["mlp"]))
    assert dict(report.skipped)["blocks.0.mlp.fc1"] == "exclude_modules"
    assert dict(report.skipped)["head"] == "classifier head"


def test_layers_to_transform() -> None:
    model = vit(depth=3)
    assert chosen(model, target_modules=["qkv"], layers_to_transform=[0, 2]) == block("attn.qkv", depth=3) - {
        "blocks.1.attn.qkv"
    }


def test_attention_and_convolutions() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "conv": nn.Conv2d(4, 8, 3), "head": nn.Linear(8, 8)})
    attention = {"attn.in_proj_weight", "attn.out_proj"}
    assert chosen(model) == chosen(model, target_modules=["attn"]) == attention
    assert chosen(model, target_modules="all") == attention | {"conv", "head"}
    assert chosen(model, target_modules=["attn.in_proj_weight"]) == {"attn.in_proj_weight"}
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert chosen(separate) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"}


def timm_head(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7)

    return make


def torchvision_head(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, num_classes=7)

    return make


def transformers_head() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=7))


HEADS = {
    "vit": (timm_head("vit_tiny_patch16_224"), {"head"}),
    "swin": (timm_head("swin_tiny_patch4_window7_224"), {"head.fc"}),
    "deit": (timm_head("deit_tiny_distilled_patch16_224"), {"head", "head_dist"}),
    "torchvision-vit": (torchvision_head("vit_b_16"), {"heads.head"}),
    "torchvision-swin": (torchvision_head("swin_t"), {"head"}),
    "transformers": (transformers_head, {"classifier"}),
}


@pytest.mark.parametrize("host", HEADS)
def test_all_linear_leaves_classifier_heads_alone(host: str) -> None:
    make, heads = HEADS[host]
    with torch.device("meta"):
        model = make()
    report = plan(model, RandLoRAConfig(rank=4))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    read = {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    assert names(report) == (linear | read) - heads
    assert {name for name, reason in report.skipped if reason == "classifier head"} == heads


def test_what_a_model_calls_its_classifier_is_a_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def get_classifier(self) -> nn.Module:
            return self.last

    assert chosen(Model()) == {"body"}


# Ranks, alphas and the numbers of the report.


def test_rank_and_alpha_patterns() -> None:
    config = RandLoRAConfig(
        rank=4,
        target_modules=["qkv", "fc1"],
        rank_pattern={"blocks.0.mlp.fc1": 16, "fc1": 8},
        alpha_pattern={"qkv": 5.0},
    )
    targets = {target.name: (target.rank, target.alpha) for target in plan(vit(), config).targets}
    assert targets["blocks.0.mlp.fc1"] == (16, 320.0) and targets["blocks.1.mlp.fc1"] == (8, 160.0)
    assert targets["blocks.0.attn.qkv"] == targets["blocks.1.attn.qkv"] == (4, 5.0)
    base, model = vit(), vit()
    report = inject(model, config)
    randomize(model)
    x = torch.randn(IMAGES)
    truth = dense_model(base, model, report)
    torch.testing.assert_close(model(x).double(), truth(x.double()), rtol=1e-3, atol=1e-4)


def test_a_rank_above_the_narrow_side() -> None:
    model = nn.ModuleDict({"narrow": nn.Linear(64, 6), "broad": nn.Linear(64, 64)})
    before = snapshot(model)
    with pytest.raises(ValueError, match="rank 8 is above the narrow side 6 of 'narrow' 6 x 64"):
        inject(model, RandLoRAConfig(rank=8, target_modules=["narrow", "broad"]))
    assert snapshot(model) == before
    report = inject(model, RandLoRAConfig(rank=8))
    assert names(report) == {"broad"} and "below rank 8" in dict(report.skipped)["narrow"]


class Heads(nn.Module):
    """A body, a head with parameters and buffers of several dtypes, and a bare scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3).bfloat16())
        self.head.register_buffer("unsaved", torch.zeros(3), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("unrelated", torch.zeros(4))


@pytest.mark.parametrize("kind", ["plain", "saved", "double"])
def test_the_report_tells_the_truth(kind: str, tmp_path: Path) -> None:
    model = Heads().double() if kind == "double" else Heads()
    base_numbers = sum(parameter.numel() for parameter in model.parameters())
    saved = ("head", "logit_scale") if kind == "saved" else ()
    config = RandLoRAConfig(rank=4, target_modules=["body.0", "body.1"], modules_to_save=saved)
    dry = plan(model, config)
    report = inject(model, config)
    assert report == dry
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert report.base_parameters == base_numbers
    assert report.num_parameters == sum(parameter.numel() for parameter in trained)
    assert count_parameters(model) == (report.num_parameters, base_numbers)
    per_target = {target.name: target.num_parameters for target in report.targets}
    for name, parameter in adapter_parameters(model):
        per_target[name[: len("body.0")]] -= parameter.numel()
    assert set(per_target.values()) == {0}
    if kind == "saved":
        expected = {name for name in model.state_dict() if name.startswith("head")} | {"logit_scale"}
        assert {path for path, _ in report.saved} == expected
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    assert report.file_bytes == path.stat().st_size
    assert f"{report.file_bytes:,} bytes" in str(report) and "body.*" in str(report)


def test_bases_are_sized_by_the_largest_narrow_and_wide_side() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(20, 24))
    report = inject(model, RandLoRAConfig(rank=3, target_modules=["0", "1"], bases="uniform"))
    columns = 3 * 7  # N = ceil(20 / 3)
    assert report.bases_bytes == 4 * (3 * 20 + 64 * columns)


def test_a_meta_model_is_planned_and_injected_without_generating_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16384, 16384) for _ in range(8)))
    monkeypatch.setattr("randlora_vision.bases.Bases._numbers", lambda *_: pytest.fail("bases were generated"))
    start = time.process_time()
    report = inject(model, RandLoRAConfig(rank=64))
    assert time.process_time() - start < 2
    assert report.num_parameters == 8 * 256 * (64 + 16384)
    assert model(torch.empty(2, 16384, device="meta")).shape == (2, 16384)


# Plans and failures leave the model unchanged; removal restores everything.


def test_a_plan_does_not_touch_the_model() -> None:
    for model, head in ((vit(), "head"), (clip(), "logit_scale")):
        before = snapshot(model)
        plan(model, RandLoRAConfig(rank=4, modules_to_save=[head]))
        plan(model, RandLoRAConfig(rank=4, target_modules=".*proj.*"))
        assert snapshot(model) == before


BAD = {
    "nothing": (dict(target_modules=["nope"]), "leaves nothing to adapt"),
    "preset": (dict(target_modules="nobody:all"), "no integration 'nobody'"),
    "preset-name": (dict(target_modules="open_clip:zzz"), "open_clip has the presets .*vision"),
    "rank": (dict(target_modules=["0", "2"], rank=7), "rank 7 is above the narrow side 6 of '2' 6 x 16"),
    "saved": (dict(target_modules=["0"], modules_to_save=["nope"]), "modules_to_save: 'nope' matches nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_failed_injection_leaves_the_model_as_it_was(case: str) -> None:
    options, message = BAD[case]
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        inject(model, RandLoRAConfig(**{"rank": 2, **options}))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["a.b", "", "a b", "ä", None, 3])
def test_malformed_adapter_names_are_refused(name: object) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name"):
        inject(model, RandLoRAConfig(rank=2), name)  # type: ignore[arg-type]
    assert snapshot(model) == before


def test_a_class_that_cannot_be_extended_leaves_the_model_as_it_was() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

    model = nn.Sequential(nn.Linear(8, 8), Final(8, 8))
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="final"):
        inject(model, RandLoRAConfig(rank=2))
    assert snapshot(model) == before


def test_zero_matches_lists_the_model_and_close_names() -> None:
    with pytest.raises(ValueError) as caught:
        plan(vit(), RandLoRAConfig(rank=4, target_modules=["attn.qvk"]))
    text = str(caught.value)
    assert "close matches: qkv" in text and "blocks.*.attn.qkv (x2)" in text and "patch_embed.proj" in text
    with pytest.raises(ValueError, match="no linear layer"):
        plan(nn.Sequential(nn.ReLU()), RandLoRAConfig())


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["0", "nope"]),
        dict(exclude_modules=["nope"]),
        dict(rank_pattern={"nope": 1}),
        dict(alpha_pattern={"nope": 1.0}),
    ],
)
def test_a_pattern_that_matches_nothing_warns(options: dict[str, object]) -> None:
    config = RandLoRAConfig(**{"rank": 2, "target_modules": ["0"], **options})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="'nope' matches nothing"):
        report = inject(mlp(), config)
    assert any("nope" in warning for warning in report.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(mlp(), RandLoRAConfig(rank=2, target_modules=["0"], rank_pattern={"0": 1}, alpha_pattern={"0": 1.0}))


def test_only_the_adapter_trains_and_remove_restores_mixed_flags() -> None:
    model = vit()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    base, before = copy.deepcopy(model), snapshot(model)
    inject(model, RandLoRAConfig(rank=4, modules_to_save=["head"]))
    inject(model, RandLoRAConfig(rank=8, target_modules=["qkv"]), "second")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name, _ in model.named_parameters() if "_randlora_" in name}
    assert trained == adapters | {"head.weight", "head.bias"} and len(adapters) == 2 * (8 + 2)
    remove(model)
    assert snapshot(model) == before
    x = torch.randn(IMAGES)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_model_has_one_place_for_its_adapters(inner_first: bool) -> None:
    model = nn.ModuleDict({"vision": mlp(), "text": mlp()})
    before = snapshot(model)
    config = RandLoRAConfig(rank=2, target_modules=["0", "2"])
    first, second = (model["vision"], model)[:: 1 if inner_first else -1]
    inject(first, config)
    adapted = snapshot(model)
    with pytest.raises(ValueError, match="injected into 'vision'" if inner_first else "part of a model"):
        inject(second, config, "other")
    assert snapshot(model) == adapted
    remove(first)
    assert snapshot(model) == before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_injection_under_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        for wrapped in (model, torch.compile(model, backend="eager")):
            with pytest.raises(ValueError, match="before wrapping the model in DistributedDataParallel"):
                inject(wrapped, RandLoRAConfig(rank=2))
        assert not any(isinstance(module, AdaptedModule) for module in model.modules())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("host", ["mlp", "attention"])
def test_an_injection_does_not_take_longer_with_many_adapters(host: str) -> None:
    model = mlp() if host == "mlp" else nn.MultiheadAttention(8, 2)
    config = RandLoRAConfig(rank=2, target_modules="all")
    calls = [python_calls(lambda name=f"a{i}": inject(model, config, name)) for i in range(12)]
    assert calls[11] <= calls[3]  # the first ones fill caches


def test_the_parameters_of_the_base_are_found_among_those_of_adapters(tmp_path: Path) -> None:
    def expected() -> list[tuple[str, int]]:
        return [(path, id(p)) for path, p in model.named_parameters() if "_randlora_" not in path]

    def found() -> list[tuple[str, int]]:
        return [(path, id(parameter)) for path, parameter in base_parameters(model)]

    model = nn.Sequential(mlp(), nn.MultiheadAttention(8, 2), nn.LayerNorm(8))
    model[0].tied = model[0][0]
    for name in "abc":
        inject(model, RandLoRAConfig(rank=2, target_modules="all"), name)
        assert found() == expected()
    model[0][0].register_parameter("late", nn.Parameter(torch.ones(1)))  # behind the adapters
    assert found() == expected() and found()[2][0] == "0.0.late"
    merge(model, "b")
    assert found() == expected()
    unmerge(model)
    delete_adapter(model, "a")
    assert found() == expected()
