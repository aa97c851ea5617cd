"""timm's presets on full-size models, its heads and features: checkpointing, fused attention, fusing, averaging."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
)
from randlora_vision.integrations import timm as integration
from randlora_vision.integrations.presets import towers as _towers
from randlora_vision.names import summarise
from tests import timm_table
from tests.integrations.test_timm_zoo import config, frozen, run, trained
from tests.integrations.test_timm_zoo import one_thread as one_thread
from tests.layers.test_zoo import MOVED, SAME, difference, draw
from tests.timm_families import FAMILIES, FAMILY, Family, build, images, make_full_size
from tests.zoo.base import flat, reading

VIT = FAMILY["vit"]

# What each preset adapts in a registered model: backbone, attention, and what conv adds.
PRESETS = {
    "vit_tiny_patch16_224": (
        ["blocks.*.attn.qkv (x12)", "blocks.*.attn.proj (x12)", "blocks.*.mlp.fc1 (x12)", "blocks.*.mlp.fc2 (x12)"],
        ["blocks.*.attn.qkv (x12)", "blocks.*.attn.proj (x12)"],
        [],
    ),
    "swin_tiny_patch4_window7_224": (
        [
            "layers.*.blocks.*.attn.qkv (x12)",
            "layers.*.blocks.*.attn.proj (x12)",
            "layers.*.blocks.*.mlp.fc1 (x12)",
            "layers.*.blocks.*.mlp.fc2 (x12)",
            "layers.*.downsample.reduction (x3)",
        ],
        ["layers.*.blocks.*.attn.qkv (x12)", "layers.*.blocks.*.attn.proj (x12)"],
        [],
    ),
    "convnext_tiny": (
        ["stages.*.blocks.*.mlp.fc1 (x18)", "stages.*.blocks.*.mlp.fc2 (x18)"],
        [],
        ["stages.*.downsample.* (x3)"],
    ),
    "vit_base_patch16_siglip_224": (
        [
            "blocks.*.attn.qkv (x12)",
            "blocks.*.attn.proj (x12)",
            "blocks.*.mlp.fc1 (x12)",
            "blocks.*.mlp.fc2 (x12)",
            *[f"attn_pool.{name}" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")],
        ],
        [
            "blocks.*.attn.qkv (x12)",
            "blocks.*.attn.proj (x12)",
            *[f"attn_pool.{name}" for name in ("q", "kv", "proj")],
        ],
        [],
    ),
    "resnet18": (
        [f"layer{i}.*.conv{j} (x2)" for i in range(1, 5) for j in (1, 2)]
        + [f"layer{i}.*.downsample.*" for i in range(2, 5)],
        [],
        [],
    ),
    "mobilenetv4_hybrid_medium_075": (None, ["query.proj", "key.proj", "value.proj", "output.proj"], []),
    "efficientvit_b0": (None, ["main.qkv.conv", "main.proj.conv"], []),
    "fastvit_sa12": (None, ["token_mixer.qkv", "token_mixer.proj"], []),
    "shvit_s1": (None, ["mixer.m.qkv.c", "mixer.m.proj.*.c"], []),
    "levit_128s": (None, ["attn.qkv.linear", "proj.ln.linear", "kv.linear", "q.ln.linear"], []),
    "resnet50_clip": (None, ["head.q", "head.k", "head.v"], []),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_known_models(name: str) -> None:
    model = make_full_size(name)
    backbone, attention, convolutions = PRESETS[name]
    chosen = {preset: targets(model) for preset, targets in integration.PRESETS.items()}
    if backbone is not None:
        assert sorted(summarise(chosen["backbone"])) == sorted(backbone)
        assert summarise(chosen["attention"]) == attention
        assert summarise([t for t in chosen["conv"] if t not in chosen["backbone"]]) == convolutions
    else:
        groups = {re.sub(r" \(x\d+\)$", "", group) for group in summarise(chosen["attention"])}
        assert {next((end for end in attention if group.endswith(end)), group) for group in groups} == set(attention)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("vit_tiny_patch16_224", {"patch_embed"}),
        ("densenet121", {"features.conv0"}),
        ("vgg11", {"features.0"}),
        ("hrnet_w18_small", {"conv1", "conv2"}),
        ("efficientnet_b0", {"conv_stem"}),
        ("vit_small_r26_s32_224", {"patch_embed.backbone.stem"}),
        ("vitamin_small_224", {"patch_embed.backbone.stem"}),
        ("naflexvit_base_patch16_gap", {"embeds"}),
        ("crossvit_tiny_240", {"patch_embed"}),
    ],
)
def test_stem(name: str, stem: set[str]) -> None:
    assert _towers.stem(make_full_size(name)) == stem


@pytest.mark.slow
def test_every_model_of_timm_has_a_backbone_and_a_guarded_head() -> None:
    """Those on the page, which is up to date, and one of each other module: its models share a class or two.

    The heads of the families on the page are guarded in their small members: see test_timm_zoo.py.
    """
    import timm

    module_of = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    lines = []
    for family in FAMILIES:
        lines.append(timm_table.line(family))
    page = timm_table.HEADER + "".join(lines)
    assert timm_table.PAGE.read_text() == page, "write it with: python -m tests.timm_table"
    seen = {module_of[family.full_size] for family in FAMILIES}
    for name, module in module_of.items():
        if module not in seen:
            seen.add(module)
            check_guarded(name, make_full_size(name, num_classes=7))
    assert len(seen) > 75


def check_guarded(name: str, model: nn.Module) -> None:
    """Nothing raises, nothing of the head is chosen."""
    report = plan(model, RandLoRAConfig(rank=4, target_modules="timm:conv"))
    heads = integration.head_modules(model)
    assert heads or name.endswith("_enc"), name
    assert not [t.name for t in report.targets if f"{t.name}.".startswith(tuple(f"{h}." for h in heads))], name
    assert model.num_classes not in {target.shape[0] for target in report.targets}, name
    paths = [path for path, _ in model.named_modules()]
    inside = tuple(f"{head}." for head in heads)
    taken = [p for p in paths if any(p.endswith(f".{head}") for head in heads) and not p.startswith(inside)]
    assert not taken, f"{name}: modules_to_save={heads} would train {taken} too"


def test_head_modules() -> None:
    expected = {
        "vit": ["head"],
        "convnext": ["head.fc"],
        "resnet": ["fc"],
        "efficientnet": ["classifier"],
        "deit_distilled": ["head", "head_dist"],
        "crossvit": ["head"],
        "volo": ["aux_head", "head"],
        "resnet_clip": ["head.proj"],
    }
    assert {name: integration.head_modules(build(FAMILY[name])) for name in expected} == expected
    with pytest.raises(ValueError, match="Linear has no get_classifier"):
        integration.head_modules(nn.Linear(4, 4))


def test_classifiers_of_wrapped_models_are_left_out() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build(FAMILY["resnet_clip"])
            self.classifier = nn.Linear(64, 32)

    chosen = integration.conv_targets(Task())
    assert "backbone.head.q" in chosen and len(chosen) == 45
    assert not {"backbone.head.proj", "classifier"} & set(chosen)


def test_errors_name_what_is_there() -> None:
    with pytest.raises(ValueError, match="timm has the presets attention, backbone, conv"):
        plan(build(VIT), RandLoRAConfig(rank=4, target_modules="timm:mlp"))
    with pytest.raises(ValueError, match="'timm:attention' leaves nothing to adapt"):
        plan(build(FAMILY["resnet"]), RandLoRAConfig(rank=4, target_modules="timm:attention"))


def saved(path: Path, **settings: object) -> Path:
    model = build(VIT)
    inject(model, config(VIT, **settings))
    return save_adapter(model, path / "adapter.safetensors")


def test_number_of_classes_in_file_and_model(tmp_path: Path) -> None:
    path = saved(tmp_path, modules_to_save=["head"])
    assert integration.num_classes(path) == 8
    for classes in (0, 5):
        model = build(VIT, num_classes=classes)
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=f"of 8 classes, but this VisionTransformer has {classes}: create"):
            integration.load_adapter(model, path)
        assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="of 8 classes"):
        integration.load_adapter(build(VIT, features_only=True, out_indices=(-1,)).model, path)
    with pytest.raises(ValueError, match="does not fit this SwinTransformer"):
        integration.load_adapter(build(FAMILY["swin"]), path)
    with pytest.raises(FileNotFoundError, match="no adapter file 'nowhere.safetensors'"):
        integration.load_adapter(build(VIT), "nowhere.safetensors")


def test_files_without_a_classifier(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert integration.num_classes(path) is None
    integration.load_adapter(build(VIT, num_classes=5), path)
    path = saved(tmp_path, modules_to_save=["norm"])
    assert integration.num_classes(path) is None
    # Other modules trained in full are not a classifier.
    path = saved(tmp_path, target_modules=["attn.qkv"], modules_to_save=["blocks.0.attn.proj"])
    integration.load_adapter(build(VIT, num_classes=5), path)
    path = saved(tmp_path, modules_to_save=["head", "blocks.0.attn.qkv"])
    with pytest.raises(ValueError, match=r"cannot tell the number of classes from .*head\.bias"):
        integration.num_classes(path)


@pytest.mark.parametrize("name", "vit beit eva02 dinov3 naflexvit swinv2 hiera convnext maxvit levit resnet".split())
def test_checkpointing_gives_equal_gradients(name: str) -> None:
    family = FAMILY[name]
    gradients = []
    for enable in (False, True):
        model = trained(family)
        model.set_grad_checkpointing(enable)
        reading(run(family, model)).backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(model)})
    plain, checkpointed = gradients
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("name", ["vit", "beit", "eva02", "dinov3_qkv_bias", "swin", "cait", "siglip", "pvtv2"])
def test_fused_and_plain_attention_agree(name: str) -> None:
    family = FAMILY[name]
    results = []
    for fused in (True, False):
        model = trained(family)
        attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
        assert attentions
        for attention in attentions:
            attention.fused_attn = fused
        output = run(family, model)
        reading(output).backward()
        results.append((output, flat(*(p.grad for _, p in adapter_parameters(model)))))
    (output, gradient), (plain_output, plain_gradient) = results
    assert difference(plain_output, output) < SAME
    assert difference(plain_gradient, gradient) < SAME


@pytest.mark.parametrize("name", ["fastvit", "repvit", "levit", "shvit", "tinyvit", "efficientvit_msra"])
@torch.no_grad()
def test_merged_model_without_adapters_fuses(name: str) -> None:
    from timm.utils import reparameterize_model

    family = FAMILY[name]
    model = trained(family)
    adapted = run(family, model)
    merge(model)
    remove(model)
    fused = reparameterize_model(model)
    assert len(list(fused.modules())) < len(list(model.modules()))
    assert not [key for key in fused.state_dict() if "_randlora_" in key]
    assert difference(run(family, fused), adapted) < SAME


@torch.no_grad()
def test_adapted_classifier_gives_features() -> None:
    model = trained(VIT)
    pixels = images(VIT, model)
    pooled = model.forward_head(model.forward_features(pixels), pre_logits=True)
    last, *_ = model.forward_intermediates(pixels, indices=1, intermediates_only=True)[-1:]
    base = frozen(VIT)
    assert difference(last, base.forward_intermediates(pixels, indices=1, intermediates_only=True)[-1]) > MOVED
    merge(model)
    remove(model)
    model.reset_classifier(0)
    assert difference(model(pixels), pooled) < SAME


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_average_of_weights(name: str, tmp_path: Path) -> None:
    from timm.utils.model_ema import ModelEmaV3

    family = FAMILY[name]
    model = build(family)
    inject(model, config(family, modules_to_save=integration.head_modules(model)))
    average = ModelEmaV3(model, decay=0.5)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3)
    expected = [parameter.detach().clone() for parameter in trainable]
    for _ in range(3):
        optimizer.zero_grad()
        reading(run(family, model)).backward()
        optimizer.step()
        average.update(model)
        expected = [old.lerp(new.detach(), 0.5) for old, new in zip(expected, trainable, strict=True)]
    kept = [parameter for parameter in average.module.parameters() if parameter.requires_grad]
    for parameter, value in zip(kept, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    path = save_adapter(average.module, tmp_path / "adapter.safetensors")
    other = frozen(family)
    load_adapter(other, path)
    with torch.no_grad():
        assert torch.equal(run(family, other), run(family, average.module))
        assert difference(run(family, other), run(family, model)) > 0


def test_frozen_batch_norm_makes_a_file_complete(tmp_path: Path) -> None:
    from timm.layers import freeze_batch_norm_2d

    family = FAMILY["resnet"]
    model = freeze_batch_norm_2d(build(family))
    inject(model, config(family, modules_to_save=integration.head_modules(model)))
    draw(model)
    model.train()
    run(family, model)
    path = save_adapter(model.eval(), tmp_path / "adapter.safetensors")
    other = frozen(family)
    integration.load_adapter(other, path)
    with torch.no_grad():
        assert difference(run(family, other), run(family, model)) < SAME


@pytest.mark.parametrize("family", FAMILIES[::30], ids=lambda family: family.id)
def test_a_row_of_the_page_is_up_to_date(family: Family) -> None:
    assert timm_table.line(family) in timm_table.PAGE.read_text()


@pytest.mark.slow
def test_peft_loses_the_weights_that_are_read() -> None:
    """PEFT's RandLora on the same linear layers: no gradient where the model reads the weight itself, else there is.

    All families that the page says read weights, and every fourth of the others.
    """
    import peft

    lost_by = {}
    for family in [f for number, f in enumerate(FAMILIES) if number % 4 == 0 or timm_table.read_weights(f)]:
        model = frozen(family)
        linear = [name for name in integration.conv_targets(model) if isinstance(model.get_submodule(name), nn.Linear)]
        if not linear:
            continue
        pattern = "|".join(map(re.escape, linear))
        peft.inject_adapter_in_model(peft.RandLoraConfig(r=family.rank, target_modules=pattern), model)
        tensors = {n: p for n, p in model.named_parameters() if ".randlora_lambda." in n or ".randlora_gamma." in n}
        generator = torch.Generator().manual_seed(0)
        for parameter in tensors.values():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        reading(run(family, model.eval())).backward()
        lost = {name.partition(".randlora_")[0] for name, p in tensors.items() if p.grad is None or not p.grad.any()}
        assert lost == timm_table.read_weights(family), family.id
        if lost:
            lost_by[family.id] = len(lost)
    assert lost_by.keys() == {"beit", "beitv2", "eva", "eva02", "dinov3_qkv_bias", "swinv2"}


@pytest.mark.slow
def test_compiled() -> None:
    """A model that reads its weights and has windows; the layers themselves are compiled in tests/layers."""
    family = FAMILY["swinv2"]
    model = frozen(family, depths=(2,), num_heads=(2,))
    inject(model, config(family, target_modules="timm:attention"))
    draw(model)
    reading(run(family, model)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter_parameters(model)}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    reading(compiled(images(family, model))).backward()
    for name, parameter in adapter_parameters(twin):
        assert difference(parameter.grad, expected[name]) < 1e-4, name
