"""Folders written by PEFT, read without PEFT: the outputs equal PEFT's for every layer, rank, kind and setting."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft.tuners.randlora.model as peft_randlora
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import inject, load_adapter, merge, remove, save_adapter, unmerge
from randlora_vision.bases import get_bases
from randlora_vision.bases.peft import PEFT_KINDS
from randlora_vision.config import RandLoRAConfig
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import mlp, randomize, snapshot
from tests.peft_helpers import answer, build, folder, load_peft, trained

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LINEAR = ["tall", "fc", "out", "wide"]


def check(tmp_path: Path, model: str, moved: bool = True, **settings: Any) -> tuple[Any, Tensor, nn.Module]:
    """Ours loaded from PEFT's folder gives PEFT's output, and so does its own file. Returns (report, output, ours)."""
    base, x = build(model)
    theirs = trained(base, **settings)
    path = folder(tmp_path / "peft", theirs)
    reference = answer(theirs, x)
    assert not moved or (reference - answer(base, x)).abs().max() > 1e-3
    ours = copy.deepcopy(base)
    report = load_adapter(ours, path)
    out = answer(ours, x)
    torch.testing.assert_close(out, reference, **TOLERANCE)
    again = copy.deepcopy(base)
    load_adapter(again, save_adapter(ours, tmp_path / "adapter.safetensors"))
    assert torch.equal(answer(again, x), out)
    return report, out, ours


TARGETS = {
    "named": LINEAR,
    "vit": ["qkv", "attn.proj", "fc1", "fc2"],
    "mixer": ["fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "hf_vit": "all-linear",
    "torch_encoder": ["0", "linear1", "linear2", "2"],
}


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("model", TARGETS)
def test_every_model(tmp_path: Path, model: str, save_projection: bool) -> None:
    report, _, _ = check(tmp_path, model, target_modules=TARGETS[model], save_projection=save_projection)
    assert report.config.bases == "peft"  # the stored numbers are recognised as the key's own
    assert any("bfloat16" in note for note in report.warnings) is not save_projection


@pytest.mark.parametrize("rank", [1, 3, 7, 12, 33])
def test_every_rank(tmp_path: Path, rank: int) -> None:
    """Ranks that divide the sides and that do not; 33 is above every side of every layer."""
    check(tmp_path, "named", target_modules=LINEAR, r=rank, save_projection=False)


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
def test_sparse_kinds(tmp_path: Path, kind: str, save_projection: bool) -> None:
    settings: dict[str, Any] = {kind: True, "save_projection": save_projection, "projection_prng_key": 7}
    report, _, ours = check(tmp_path, "vit", target_modules=TARGETS["vit"], **settings)
    assert report.config.bases == f"peft_{kind}" and not report.warnings
    bases = next(adapted_modules(ours))[3].slots["default"].bases
    assert bases.a(torch.device("cpu"), torch.float32).unique().numel() == 3


def test_both_sparse_flags_are_very_sparse(tmp_path: Path) -> None:
    report, *_ = check(tmp_path, "named", target_modules=LINEAR, sparse=True, very_sparse=True, save_projection=False)
    assert report.config.bases == "peft_very_sparse"


@pytest.mark.parametrize("key", [-1, -(2**63), 2**63 + 5])
def test_keys_of_any_sign(tmp_path: Path, key: int) -> None:
    check(tmp_path, "named", target_modules=LINEAR, projection_prng_key=key, save_projection=False)


def test_projections_drawn_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT on hardware without bfloat16: seed-only folders need `peft_dtype`, stored projections do not."""
    monkeypatch.setattr(peft_randlora, "is_bf16_available", lambda: False)
    report, *_ = check(tmp_path, "named", target_modules=LINEAR)
    assert report.config.bases == "peft_float16"
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR, save_projection=False)
    path = folder(tmp_path / "seed", theirs)
    ours = copy.deepcopy(base)
    report = load_adapter(ours, path, peft_dtype=torch.float16)
    torch.testing.assert_close(answer(ours, x), answer(theirs, x), **TOLERANCE)
    assert "torch.float16; if PEFT drew them in torch.bfloat16" in report.warnings[-1]
    other = copy.deepcopy(base)
    load_adapter(other, path)
    assert (answer(other, x) - answer(theirs, x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"bfloat16 or float16, not in torch.float32"):
        load_adapter(copy.deepcopy(base), path, peft_dtype=torch.float32)


SETTINGS: dict[str, dict[str, Any]] = {
    "regex": {"target_modules": r"blocks\.[02]\.(fc|out)|tall"},
    "layers_to_transform": {"target_modules": ["fc", "out"], "layers_to_transform": [1, 2], "layers_pattern": "blocks"},
    "one layer": {"target_modules": ["fc"], "layers_to_transform": 1, "layers_pattern": ["blocks"]},
    "bias all": {"target_modules": LINEAR, "bias": "all"},
    "bias of adapted layers": {"target_modules": LINEAR, "bias": "randlora_only"},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["head", "norm"]},
    # PEFT matches the ends of names, so that "ead" is the head.
    "part of a name": {"target_modules": LINEAR, "modules_to_save": ["ead"]},
    "all of it": {"target_modules": LINEAR, "modules_to_save": ["head"], "bias": "all"},
    "dropout": {"target_modules": LINEAR, "randlora_dropout": 0.25},
    "alpha": {"target_modules": LINEAR, "randlora_alpha": 7},
    "one layer alone": {"target_modules": ["wide"]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting(tmp_path: Path, case: str) -> None:
    report, _, _ = check(tmp_path, "named", **SETTINGS[case])
    assert report.config.dropout == SETTINGS[case].get("randlora_dropout", 0.0)


def test_conv1d_with_linear_layers_beside_it(tmp_path: Path) -> None:
    """PEFT sizes bases by outputs and inputs, and the shape of a Conv1D is transposed."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(30, 9), nn.Linear(30, 11), Conv1D(11, 11)).eval()
    x = torch.randn(4, 9)
    for i, save_projection in enumerate((True, False)):
        theirs = trained(base, target_modules=["0", "1", "2"], save_projection=save_projection)
        ours = copy.deepcopy(base)
        report = load_adapter(ours, folder(tmp_path / str(i), theirs))
        assert report.config.bases == "peft"
        torch.testing.assert_close(answer(ours, x), answer(theirs, x), **TOLERANCE)
        before = answer(ours, x)
        merge(ours)
        torch.testing.assert_close(answer(ours, x), before, **TOLERANCE)
        assert all(parameter.is_contiguous() for parameter in ours.parameters())
        unmerge(ours)
        remove(ours)
        assert torch.equal(answer(ours, x), answer(base, x))


def test_gradients_through_a_square_conv1d(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base, x = nn.Sequential(Conv1D(10, 10)), torch.randn(4, 10)
    theirs = trained(base, target_modules=["0"])
    ours = copy.deepcopy(base)
    load_adapter(ours, folder(tmp_path, theirs), trainable=True)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    layer = theirs.base_model.model[0]
    mine = ours[0].adapter_tensors("weight", "default")
    for tensor, peer in zip(mine, (layer.randlora_lambda["default"], layer.randlora_gamma["default"]), strict=True):
        torch.testing.assert_close(tensor.grad, peer.grad, rtol=1e-4, atol=1e-5)


def rewrite(path: Path, change: Any, **settings: Any) -> Path:
    """The folder with its tensors changed by `change` and its settings replaced."""
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors = safetensors.torch.load_file(weights)
    change(tensors)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return path


def test_bases_that_no_key_makes_are_stored_once(tmp_path: Path) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(torch.rand_like(theirs.base_model.randlora_B["default"]))
    ours = copy.deepcopy(base)
    report = load_adapter(ours, folder(tmp_path / "peft", theirs), trainable=True)
    assert report.config.bases == "stored"
    torch.testing.assert_close(answer(ours, x), answer(theirs, x), **TOLERANCE)
    file = save_adapter(ours, tmp_path / "adapter.safetensors")
    assert file.stat().st_size == report.file_bytes
    assert {"bases.A", "bases.B"} <= safetensors.torch.load_file(file).keys()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(answer(copied, x), answer(ours, x))
        assert save_adapter(copied, tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()
    again = copy.deepcopy(base)
    load_adapter(again, file, "a")
    load_adapter(again, file, "b")
    slots = next(adapted_modules(again))[3].slots
    assert slots["a"].bases is slots["b"].bases  # equal numbers are kept once
    with pytest.raises(ValueError, match="too small"):
        from randlora_vision.injection.plan import make_plan

        make_plan(build("vit")[0], RandLoRAConfig(rank=5, bases="stored"), "x", slots["a"].bases)


def test_one_copy_of_the_projections_is_enough_wherever_it_is(tmp_path: Path) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR)
    for i, kept in enumerate(("base_model.randlora_", "base_model.model.blocks.1.fc.randlora_")):
        path = folder(tmp_path / str(i), theirs)

        def keep(tensors: dict[str, Tensor], kept: str = kept) -> None:
            for name in list(tensors):
                if name.endswith(("_A", "_B")) and not name.startswith(kept):
                    del tensors[name]

        ours = copy.deepcopy(base)
        load_adapter(ours, rewrite(path, keep))
        torch.testing.assert_close(answer(ours, x), answer(theirs, x), **TOLERANCE)


def test_half_precision_files(tmp_path: Path) -> None:
    base, x = build("named")
    theirs = trained(base, target_modules=LINEAR)
    path = folder(tmp_path, theirs)
    rewrite(path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    ours = copy.deepcopy(base)
    load_adapter(ours, path)
    torch.testing.assert_close(answer(ours, x), answer(load_peft(base, path), x), **TOLERANCE)


def test_pefts_own_kinds_train_and_come_back(tmp_path: Path) -> None:
    for kind in PEFT_KINDS:
        model, fresh = mlp(), mlp()
        inject(model, RandLoRAConfig(rank=4, bases=kind, target_modules=["0", "2"]))
        randomize(model)
        load_adapter(fresh, save_adapter(model, tmp_path / f"{kind}.safetensors"))
        x = torch.randn(3, 8)
        assert torch.equal(fresh(x), model(x)) and not torch.equal(fresh(x), mlp()(x))
        spec = next(adapted_modules(model))[3].slots["default"].bases.spec
        assert abs(get_bases(spec).b(torch.device("cpu"), torch.float32).std() - 1) < 0.01
    with pytest.raises(ValueError, match="one rank for all"):
        inject(mlp(), RandLoRAConfig(rank=4, bases="peft", rank_pattern={"0": 2}, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match="choose another kind"):
        inject(mlp(), RandLoRAConfig(rank=4, bases="stored", target_modules=["0", "2"]))


def first_lambda(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("randlora_lambda"))


def lora(path: Path) -> None:
    import peft

    base, _ = build("named")
    peft.get_peft_model(base, peft.LoraConfig(target_modules=LINEAR)).save_pretrained(path)


def to_pickle(path: Path) -> None:
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    torch.save(tensors, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


def add(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(shape)})


BAD: dict[str, tuple[Any, str]] = {
    "lora": (lora, "holds PEFT's 'LORA', not a RandLora adapter"),
    "pickle": (to_pickle, "adapter_model.bin is a pickle: opening one runs the code"),
    "renamed pickle": (
        lambda p: torch.save({"a": torch.zeros(2)}, p / "adapter_model.safetensors"),
        "it is a pickle",
    ),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), "without PEFT's adapter_config.json"),
    "config no json": (lambda p: (p / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "config nested": (lambda p: (p / "adapter_config.json").write_text("[" * 200_000), "is not valid JSON"),
    "config binary": (lambda p: (p / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "config list": (lambda p: (p / "adapter_config.json").write_text("[]"), "JSON object"),
    "config huge": (lambda p: (p / "adapter_config.json").write_text(" " * 2**24 + "{}"), "too large"),
    "truncated": (
        lambda p: (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-9]),
        "not a readable safetensors",
    ),
    "rank": (lambda p: rewrite(p, lambda t: None, r=6), "but rank 6 and the model's layer need"),
    "rank type": (lambda p: rewrite(p, lambda t: None, r="5"), "lacks a valid setting"),
    "rank zero": (lambda p: rewrite(p, lambda t: None, r=0), "lacks a valid setting"),
    "alpha": (lambda p: rewrite(p, lambda t: None, randlora_alpha=0), "alpha must be a positive"),
    "key": (lambda p: rewrite(p, lambda t: None, projection_prng_key="x"), "lacks a valid setting"),
    "lambda alone": (lambda p: rewrite(p, add("no.randlora_lambda", 5, 4)), "is incomplete"),
    "no gamma": (lambda p: rewrite(p, lambda t: t.pop(first_lambda(t).replace("lambda", "gamma"))), "is incomplete"),
    "no layers": (lambda p: rewrite(p, dict.clear), "is incomplete"),
    "nan": (lambda p: rewrite(p, lambda t: t[first_lambda(t)].fill_(float("nan"))), "lambda holds NaN or infinity"),
    "inf base": (lambda p: rewrite(p, lambda t: t["base_model.randlora_B"].fill_(float("inf"))), "NaN or infinity"),
    "nan saved": (lambda p: rewrite(p, lambda t: t["base_model.model.head.bias"].fill_(float("nan"))), "NaN"),
    "integers": (lambda p: rewrite(p, lambda t: t.update({first_lambda(t): t[first_lambda(t)].int()})), "int32"),
    "unequal bases": (
        lambda p: rewrite(p, lambda t: t["base_model.model.tall.randlora_B"].add_(1)),
        "differs from the other layers'",
    ),
    "flat base": (lambda p: rewrite(p, add("tall.randlora_A", 3)), "has the shape"),
    "unknown part": (lambda p: rewrite(p, add("tall.randlora_C", 3)), "unknown tensor"),
    "foreign tensor": (lambda p: rewrite(p, add("../../etc/passwd", 3)), "modules_to_save"),
    "saved shape": (lambda p: rewrite(p, add("head.bias", 4)), "head.bias is .*3.* in the model and .*4.* in the file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_clear_error_and_the_model_is_untouched(tmp_path: Path, case: str) -> None:
    damage, message = BAD[case]
    base, _ = build("named")
    path = folder(tmp_path / "peft", trained(base, target_modules=LINEAR, modules_to_save=["head"]))
    damage(path)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(base, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert snapshot(base) == before


def test_the_wrong_model_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, trained(build("named")[0], target_modules=["wide", "fc"]))
    model = nn.Module()
    model.wide = nn.Linear(20, 7)
    with pytest.raises(ValueError, match=r"has no layer 'blocks.0.fc'"):
        load_adapter(model, path)
    tied, _ = build("named")
    tied.blocks[0]["fc"].weight = tied.blocks[1]["fc"].weight
    with pytest.raises(ValueError, match="shares its weight with 'blocks.1.fc'"):
        load_adapter(tied, path)
    other, _ = build("named")
    other.wide = nn.Embedding(7, 20)
    with pytest.raises(ValueError, match="no layer 'wide'|not a linear layer"):
        load_adapter(other, path)


def test_a_folder_in_the_folder_is_named(tmp_path: Path) -> None:
    base, _ = build("named")
    folder(tmp_path / "run" / "mine", trained(base, target_modules=LINEAR))
    with pytest.raises(ValueError, match="it contains: mine"):
        load_adapter(base, tmp_path / "run")


def test_an_absurd_rank_makes_no_bases(tmp_path: Path) -> None:
    """Lambda has 100,000 numbers, but B would have 20 times as many per layer: refused before allocation."""
    base, _ = build("named")
    path = folder(tmp_path, trained(base, target_modules=["tall"], save_projection=False))
    rank = 100_000

    def grow(tensors: dict[str, Tensor]) -> None:
        tensors[first_lambda(tensors)] = torch.zeros(rank, 1)
        tensors[first_lambda(tensors).replace("lambda", "gamma")] = torch.zeros(1, 12)

    with pytest.raises(ValueError, match=f"rank {rank} is above every side"):
        load_adapter(base, rewrite(path, grow, r=rank))


def test_a_module_under_two_names_is_refused(tmp_path: Path) -> None:
    """PEFT wraps it under its first name, and the second use stays the base's: in place both would change."""
    shared = nn.Linear(6, 6)
    base = nn.Sequential(shared, nn.Tanh(), shared)
    path = folder(tmp_path, trained(base, target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' cannot be adapted: it shares its weight with '2'"):
        load_adapter(base, path)
