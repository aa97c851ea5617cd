"""PEFT's own loader reads what `export` writes, and live PEFT models are converted: the outputs are the same."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import peft.tuners.randlora.model as peft_randlora
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, remove, save_adapter, set_active, set_scale
from randlora_vision.integrations.peft import export, from_peft
from tests.helpers import clip, randomize, snapshot, vit
from tests.peft_helpers import MODELS, Named, answer, build, load_peft, move, trained

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LINEAR = ["tall", "fc", "out", "wide"]


def adapted(base: nn.Module, seed: int = 0, **settings: Any) -> nn.Module:
    """Our adapter on a copy of the base, with all trained parameters changed."""
    model = copy.deepcopy(base)
    inject(model, RandLoRAConfig(**{"rank": 5, "alpha": 15, "bases": "uniform", **settings}))
    randomize(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_randlora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def check(tmp_path: Path, name: str, **settings: Any) -> dict[str, Tensor]:
    """Check that PEFT's loader gives our output and ours reads the folder back; return the tensors in the file."""
    base, x = build(name)
    ours = adapted(base, **settings)
    reference = answer(ours, x)
    assert (reference - answer(base, x)).abs().max() > 1e-3
    path = export(ours, tmp_path / "peft")
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.testing.assert_close(answer(load_peft(base, path), x), reference, **TOLERANCE)
    back = copy.deepcopy(base)
    load_adapter(back, path)
    torch.testing.assert_close(answer(back, x), reference, **TOLERANCE)
    return safetensors.torch.load_file(path / "adapter_model.safetensors")


TARGETS: dict[str, Any] = {
    "named": LINEAR,
    "vit": "all-linear",
    "mixer": ["fc1", "fc2"],
    "gpt2": "all-linear",
    "hf_vit": "all-linear",
    "torch_encoder": ["0", "linear1", "linear2", "2"],
}


@pytest.mark.parametrize("bases", ["uniform", "peft"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(tmp_path: Path, name: str, bases: str) -> None:
    tensors = check(tmp_path, name, target_modules=TARGETS[name], bases=bases, rank=3)
    stored = sorted(key for key in tensors if key.endswith(("_A", "_B")))
    assert stored == ([] if bases == "peft" else ["base_model.randlora_A", "base_model.randlora_B"])


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("bases", ["normal", "sparse", "very_sparse", "peft_sparse", "peft_very_sparse"])
def test_every_kind_and_several_ranks(tmp_path: Path, bases: str, rank: int) -> None:
    tensors = check(tmp_path, "named", target_modules=LINEAR, bases=bases, rank=rank, seed=2**63 + 9)
    assert ("base_model.randlora_B" in tensors) is not bases.startswith("peft_")


def test_float16_projections_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would draw them in another dtype on this machine."""
    assert "base_model.randlora_B" in check(tmp_path, "named", target_modules=LINEAR, bases="peft_float16")


def test_stored_bases_are_stored_again(tmp_path: Path) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR)
    theirs.base_model.randlora_A["default"].mul_(1.5)
    ours = from_peft(theirs)
    reference = answer(ours, x)
    torch.testing.assert_close(answer(load_peft(base, export(ours, tmp_path)), x), reference, **TOLERANCE)


def test_alphas_of_every_layer_go_into_lambda(tmp_path: Path) -> None:
    check(tmp_path, "named", target_modules=LINEAR, alpha_pattern={"fc": 40.0, "blocks.1.out": 2.5})


def test_names_that_end_like_others(tmp_path: Path) -> None:
    """PEFT matches the ends of names: given "0", it would adapt "1.0" too."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())).eval()
    x = torch.randn(3, 6)
    ours = adapted(base, rank=2, target_modules="0")
    path = export(ours, tmp_path)
    assert json.loads((path / "adapter_config.json").read_text())["target_modules"] == "0"
    torch.testing.assert_close(answer(load_peft(base, path), x), answer(ours, x), **TOLERANCE)


SAVED: dict[str, tuple[list[str], list[str] | None]] = {
    "head": (["head"], ["head"]),
    "two modules": (["head", "norm"], ["norm", "head"]),
    "a parameter": (["norm.weight"], None),
    "biases": (["bias"], None),
    "a container": (["blocks.1"], ["blocks.1.fc", "blocks.1.out"]),
}


@pytest.mark.parametrize("case", SAVED)
def test_modules_trained_in_full(tmp_path: Path, case: str) -> None:
    asked, expected = SAVED[case]
    check(tmp_path, "named", target_modules=LINEAR, modules_to_save=asked)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] == expected


def test_a_saved_module_that_peft_would_confuse_is_written_as_tensors(tmp_path: Path) -> None:
    class Twice(Named):
        def __init__(self) -> None:
            super().__init__()
            self.overhead = nn.Linear(12, 12)  # ends in "head"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.overhead(x))

    torch.manual_seed(0)
    base, x = Twice().eval(), torch.randn(6, 12)
    ours = adapted(base, target_modules=LINEAR, modules_to_save=["head"])
    path = export(ours, tmp_path)
    assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"] is None
    torch.testing.assert_close(answer(load_peft(base, path), x), answer(ours, x), **TOLERANCE)


def test_the_one_warning_of_pefts_loader(tmp_path: Path) -> None:
    """The warning lists only copies of the bases, which all layers share, as the README says."""
    base, x = build("named")
    ours = adapted(base, target_modules=LINEAR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(export(ours, tmp_path)))
    (message,) = (str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message))
    assert "randlora_A" in message and "lambda" not in message and "gamma" not in message
    one = theirs.base_model.randlora_B["default"]
    layers = [module for module in theirs.modules() if hasattr(module, "randlora_lambda")]
    assert len(layers) == 8 and all(layer.randlora_B["default"] is one for layer in layers)
    torch.testing.assert_close(answer(theirs.eval(), x), answer(ours, x), **TOLERANCE)


def test_one_adapter_of_several_at_any_scale_and_precision(tmp_path: Path) -> None:
    base, x = build("named")
    ours = adapted(base, target_modules=LINEAR)
    reference = answer(ours, x)
    inject(ours, RandLoRAConfig(rank=3, target_modules=["wide"]), "other")
    randomize(ours, "other")
    set_active(ours, "other")
    set_scale(ours, 0.5, "default")  # of the run, not of the adapter
    path = export(ours, tmp_path / "a", "default")
    torch.testing.assert_close(answer(load_peft(base, path), x), reference, **TOLERANCE)
    double = adapted(copy.deepcopy(base).double(), target_modules=LINEAR)
    path = export(double, tmp_path / "b")
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_what_peft_cannot_express_is_named_in_one_error(tmp_path: Path) -> None:
    model = clip()
    inject(model, RandLoRAConfig(rank=4, target_modules="all", rank_pattern={"0.mlp.c_fc": 8}))
    before = snapshot(model)
    with pytest.raises(ValueError, match="PEFT's RandLora cannot express") as caught:
        export(model, tmp_path / "peft")
    message = str(caught.value)
    for name in (
        "visual.conv1",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.1.attn.in_proj_weight",
        "visual.transformer.resblocks.1.attn.out_proj",
        "transformer.resblocks.0.mlp.c_fc",
    ):
        assert name in message
    assert "\n" not in message and not (tmp_path / "peft").exists() and snapshot(model) == before


def test_structured_bases_and_tied_layers_are_refused(tmp_path: Path) -> None:
    model = vit()
    inject(model, RandLoRAConfig(rank=4))
    with pytest.raises(ValueError, match="cannot express structured bases"):
        export(model, tmp_path)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    inject(tied, RandLoRAConfig(rank=2, bases="uniform"))
    with pytest.raises(ValueError, match="several names or owners: 0"):
        export(tied, tmp_path)


# Live models.


@pytest.mark.parametrize("name", MODELS)
def test_a_live_model_is_taken_over(name: str) -> None:
    base, x = build(name)
    targets = TARGETS[name] if name in ("named", "mixer", "torch_encoder") else "all-linear"
    theirs = trained(base, target_modules=targets)
    reference, inner = answer(theirs, x), theirs.base_model.model
    ours = from_peft(theirs)
    assert ours is inner
    torch.testing.assert_close(answer(ours, x), reference, **TOLERANCE)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    remove(ours)
    assert torch.equal(answer(ours, x), answer(base, x))
    assert ours.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("settings", [{"save_projection": False}, {"bias": "randlora_only"}, {"sparse": True}])
def test_a_live_models_settings(settings: dict[str, Any]) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR, **settings)
    reference = answer(theirs, x)
    torch.testing.assert_close(answer(from_peft(theirs), x), reference, **TOLERANCE)


def test_several_live_adapters_with_a_head_each(tmp_path: Path) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR, modules_to_save=["head"])
    second = peft.RandLoraConfig(r=5, randlora_alpha=30, target_modules=["wide"], modules_to_save=["head"])
    theirs.add_adapter("b", second)
    theirs.set_adapter("b")
    move(theirs, seed=2)
    references = {}
    for name in ("default", "b"):
        theirs.set_adapter(name)
        references[name] = answer(theirs, x)
    ours = from_peft(theirs, trainable=True)
    torch.testing.assert_close(answer(ours, x), references["b"], **TOLERANCE)  # the one that was active
    assert ours.head.weight.requires_grad
    for name, reference in references.items():
        set_active(ours, name)
        torch.testing.assert_close(answer(ours, x), reference, **TOLERANCE)
        fresh = copy.deepcopy(base)
        load_adapter(fresh, save_adapter(ours, tmp_path / f"{name}.safetensors", name))
        assert torch.equal(answer(fresh, x), answer(ours, x))
    remove(ours)
    assert torch.equal(answer(ours, x), answer(base, x))


def test_a_live_float16_draw_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peft_randlora, "is_bf16_available", lambda: False)
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR, save_projection=False)
    reference = answer(theirs, x)
    ours = from_peft(theirs)
    torch.testing.assert_close(answer(ours, x), reference, **TOLERANCE)
    assert save_adapter(ours, tmp_path / "a.safetensors").stat().st_size < 16 * 1024


def test_other_models_are_refused_before_they_are_touched() -> None:
    base, _ = build("named")
    with pytest.raises(ValueError, match="expected a peft.PeftModel, got Named"):
        from_peft(base)
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=LINEAR))
    merged = trained(base, target_modules=LINEAR)
    merged.merge_adapter()
    tied = copy.deepcopy(base)
    tied.blocks[0]["fc"].weight = tied.blocks[1]["fc"].weight
    tied = trained(tied, target_modules=LINEAR)
    cases = (
        (lora, "these have another PEFT type: default"),
        (merged, r"unmerge_adapter\(\)"),
        (tied, "weights of .*blocks.0.fc.* are shared"),
    )
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            from_peft(model)
        assert any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())
