"""The adapter file: it restores the same bits, stays small, and a faulty file leaves the model unchanged."""

from __future__ import annotations

import base64
import copy
import gc
import hashlib
import importlib
import json
import os
import pickle
import stat
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
    set_active,
)
from randlora_vision.bases import BasesSpec, get_bases
from tests.adapter_files import Tamper, edit, rewritten, summed
from tests.helpers import IMAGES, clip, dense_model, mlp, randomize, snapshot, tensor_bytes, vit

CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"])
X = torch.linspace(-2, 2, 24).reshape(3, 8)


def saved(path: Path, model: nn.Module | None = None, config: RandLoRAConfig = CONFIG) -> Path:
    """A file with a random adapter of a fresh base."""
    model = mlp() if model is None else model
    inject(model, config)
    randomize(model)
    return save_adapter(model, path / "adapter.safetensors")


# Round trips.


@pytest.mark.parametrize("bases", ["uniform", "normal", "sparse", "very_sparse"])
def test_a_vit_comes_back_bit_for_bit(tmp_path: Path, bases: str) -> None:
    model, x = vit(), torch.randn(IMAGES)
    config = RandLoRAConfig(
        rank=4,
        bases=bases,
        seed=2**64 - 1,
        rank_pattern={"fc1": 8},
        alpha_pattern={"qkv": 3.0},
        modules_to_save=["head"],
    )
    path = saved(tmp_path, model, config)
    with torch.no_grad():
        model.head.weight.add_(1)
    save_adapter(model, path)
    fresh = vit()
    report = load_adapter(fresh, path)
    assert report.config == config and torch.equal(fresh(x), model(x))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    remove(fresh)
    assert torch.equal(fresh(x), vit()(x))
    load_adapter(fresh, path, "again", trainable=True)
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in fresh.state_dict() if "_randlora_" in name} | {"head.weight", "head.bias"}


def test_a_clip_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, fresh = clip(), clip()
    path = saved(tmp_path, model, RandLoRAConfig(rank=4, modules_to_save=["logit_scale"]))
    load_adapter(fresh, path)
    image, text = torch.randn(IMAGES), torch.randint(1, 32, (2, 8))
    with torch.no_grad():  # frozen attention takes another kernel where gradients are on
        assert all(torch.equal(a, b) for a, b in zip(model(image, text), fresh(image, text), strict=True))


def test_float64_adapters_keep_all_their_bits(tmp_path: Path) -> None:
    model, fresh = mlp().double(), mlp().double()
    load_adapter(fresh, saved(tmp_path, model))
    assert torch.equal(fresh(X.double()), model(X.double()))


def test_a_loaded_adapter_joins_the_others(tmp_path: Path) -> None:
    path = saved(tmp_path)
    alone, model = mlp(), mlp()
    load_adapter(alone, path)
    inject(model, RandLoRAConfig(rank=3, seed=4, target_modules=["0"]), "first")
    load_adapter(model, path, "second")
    assert torch.equal(model(X), alone(X))  # the first has not been trained
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(model, "first"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already has an adapter 'second'"):
        load_adapter(model, path, "second")
    assert snapshot(model) == before


def test_saving_an_inactive_or_merged_adapter_saves_its_own_numbers(tmp_path: Path) -> None:
    model = vit()
    config = RandLoRAConfig(rank=4, modules_to_save=["head"])
    for i, name in enumerate(("a", "b")):
        inject(model, config, name)
        set_active(model, name)
        randomize(model, name, seed=i)
        with torch.no_grad():
            model.head.weight.add_(i + 1)
    x = torch.randn(IMAGES)
    outs = {}
    for name in ("a", "b"):
        set_active(model, name)
        outs[name] = model(x)
    merge(model, "b")
    for name in ("a", "b"):
        fresh = vit()
        load_adapter(fresh, save_adapter(model, tmp_path / f"{name}.safetensors", name))
        assert torch.equal(fresh(x), outs[name])


def test_saving_takes_buffers_as_they_are_now(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double()

    model, fresh = make().float(), make()
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    randomize(model)
    model.double().train()(X.double())  # the move creates new buffers, the step updates them
    load_adapter(fresh, save_adapter(model, tmp_path / "adapter.safetensors"))
    assert int(fresh[1].num_batches_tracked) == 1
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)


def test_wrapped_models_are_saved_and_loaded(tmp_path: Path) -> None:
    model = mlp()
    path = saved(tmp_path, model)
    compiled = torch.compile(model, backend="eager")
    path.unlink()
    assert save_adapter(compiled, path) == path
    fresh = mlp()
    load_adapter(torch.compile(fresh, backend="eager"), path)
    assert torch.equal(fresh(X), model(X))


def test_saved_tensors_that_are_tied(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[2].weight = model[1].weight
        return model

    model, fresh = make(), make()
    config = RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2"])
    path = saved(tmp_path, model, config)
    with torch.no_grad():
        model[1].weight.mul_(2)
    save_adapter(model, path)
    load_adapter(fresh, path)
    assert torch.equal(fresh(X), model(X)) and fresh[1].weight is fresh[2].weight


# Size and writing.


def payload(report: Any, model: nn.Module) -> int:
    kept = sum(model.state_dict()[name].nbytes for name, _ in report.saved)
    return 4 * sum(target.num_parameters for target in report.targets) + kept


def test_a_file_is_at_most_16_kib_above_its_numbers(tmp_path: Path) -> None:
    import open_clip
    import timm

    for model in (vit(depth=48), clip()):
        report = inject(model, RandLoRAConfig(rank=4))
        path = save_adapter(model, tmp_path / "adapter.safetensors")
        assert path.stat().st_size == report.file_bytes <= payload(report, model) + 16 * 1024
    with torch.device("meta"):
        large = [
            (timm.create_model("vit_base_patch16_224"), RandLoRAConfig(rank=32, modules_to_save=["head"])),
            (timm.create_model("vit_giant_patch14_clip_224"), RandLoRAConfig(rank=32)),
            (
                open_clip.create_model("ViT-B-32", device="meta"),
                RandLoRAConfig(rank=32, modules_to_save=["logit_scale"]),
            ),
        ]
    for model, config in large:
        report = plan(model, config)
        assert len(report.targets) >= 48
        assert report.file_bytes <= payload(report, model) + 16 * 1024


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    path = saved(tmp_path, model)
    old = path.read_bytes()
    randomize(model, seed=7)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = saved(tmp_path / "made" / "on the way")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_an_adapter_is_loaded_before_the_weights_of_its_model(tmp_path: Path, how: str) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    path = saved(tmp_path, model)
    with torch.device("meta"):
        late = mlp()
    load_adapter(late, path, trainable=True)
    assert late[0].weight.is_meta and not any(p.is_meta for _, p in adapter_parameters(late))
    for x in (X, X.to("meta")):
        with pytest.raises(RuntimeError, match="load the weight's values first"):
            late(x)
    if how == "to_empty":
        late.to_empty(device="cpu")
    late.load_state_dict(base.state_dict(), assign=how == "assign")
    assert torch.equal(late(X), model(X))
    late(X).sum().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(late))


@pytest.mark.parametrize("kind", ["uniform", "structured"])
def test_other_bases_are_refused_before_their_first_use_if_the_model_had_no_weights(tmp_path: Path, kind: str) -> None:
    config = RandLoRAConfig(rank=2, target_modules=["0", "2"], bases=kind, seed=8_422)
    path = rewritten(saved(tmp_path, config=config), edit("bases", crc32="0" * 8))
    message = f"{path}: the bases made from seed 8422 are not .*, expected 00000000"
    with torch.device("meta"):
        late = mlp()
    load_adapter(late, path)
    late.load_state_dict(mlp().state_dict(), assign=True)
    other = copy.deepcopy(late)
    for _ in range(2):
        for model in (late, other):
            with pytest.raises(ValueError, match=message):
                model(X)
            with pytest.raises(ValueError, match=message):
                save_adapter(model, tmp_path / "again.safetensors")
    copied = pickle.loads(pickle.dumps(late))
    delete_adapter(late, "default")
    with pytest.raises(ValueError, match=message):
        other(X)
    remove(other)
    with pytest.raises(ValueError, match=message):
        copied(X)
    remove(copied)  # nothing refers to the file any more, which is not held against others with the same bases
    load_adapter(late, saved(tmp_path, config=config))
    assert late(X).shape == (3, 6)


@pytest.mark.parametrize("kind", ["uniform", "structured"])
def test_only_the_bases_themselves_are_drawn(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix twice, none larger than the layers need, and none at all before a file is checked or a layer called."""
    config = RandLoRAConfig(rank=4, target_modules="all-linear", bases=kind, seed=8_421)
    path = saved(tmp_path, vit(), config)
    gc.collect()
    get_bases.__globals__["_LIVE"].clear()
    drawn: list[tuple[int, ...]] = []
    cls = type(get_bases(BasesSpec(kind, 0, 1, 1, 1, 1)))
    generate = cls.generate

    def counted(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> Any:
        drawn.append((matrix, rows, columns))
        return generate(kind, seed, matrix, rows, columns, narrow)

    monkeypatch.setattr(cls, "generate", staticmethod(counted))
    with torch.device("meta"):
        model, other = vit(), vit()
    inject(model, config)
    plan(other, config, "other")
    assert drawn == []
    load_adapter(other, path)
    load_adapter(other, path, "again")
    assert drawn == []
    other.load_state_dict(vit().state_dict(), assign=True)
    with torch.no_grad():
        other(torch.randn(IMAGES))
    # A, and B for 32 to 128 features; structured ones are never written out
    assert sorted(drawn) == ([(0, 4, 32), (1, 128, 32)] if kind == "uniform" else [])


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model, other = mlp(), mlp()
    path = saved(tmp_path)
    inject(model, CONFIG)
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(model, tmp_path / "meta.safetensors")
    with pytest.raises(ValueError, match=r"one .safetensors file"):
        save_adapter(model, tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(mlp(), path)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(model, path, "other")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        load_adapter(mlp(), tmp_path / "missing.safetensors")
    assert os.listdir(tmp_path) == [path.name]
    path = saved(tmp_path, config=RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"]))
    with pytest.raises(ValueError, match="trains 2.weight in full, which is on the meta device"):
        load_adapter(other, path)  # the values would be lost silently


# Everything that can be wrong with a file.


def in_place_of_crc32(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """The right checksum, but of another algorithm."""
    metadata["sha256"] = hashlib.sha256(summed(tensors, metadata)).hexdigest()
    del metadata["crc32"]


def bases_of_another_seed(metadata: dict[str, str], _: dict[str, Tensor]) -> None:
    """Bases that match their own record, but not the configuration's seed."""
    spec = {**json.loads(metadata["bases"]), "seed": 5}
    del spec["crc32"]
    metadata["bases"] = json.dumps({**spec, "crc32": get_bases(BasesSpec(**spec)).crc32})


def targets(text: str) -> Tamper:
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return lambda metadata, _: metadata.update(targets=packed)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


GROUP = "2x4.8"
LISTED = [["0", 16, 8, 2, 40.0], ["2", 6, 16, 2, 40.0]]
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not a readable safetensors"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "not a readable safetensors"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "not a readable safetensors"),
    "text": (lambda p: p.write_text("hello, I am not an adapter"), "not a readable safetensors"),
    "pickle": (lambda p: torch.save({"a": torch.zeros(3)}, p), "not a readable safetensors"),
    "flipped payload": (lambda p: flip(p, -1), "altered or damaged.*CRC-32"),
    "plain safetensors": (
        lambda p: safetensors.torch.save_file({"a": torch.zeros(3)}, p),
        "not a RandLoRA adapter file",
    ),
    "format": (lambda p: rewritten(p, lambda m, _: m.update(format="other")), "not a RandLoRA adapter file"),
    "newer": (lambda p: rewritten(p, lambda m, _: m.update(format_version="4")), "format version 4, newer.*upgrade"),
    "version": (lambda p: rewritten(p, lambda m, _: m.update(format_version="x")), "no valid format_version"),
    "no version": (lambda p: rewritten(p, lambda m, _: m.pop("format_version")), "no valid format_version"),
    "no checksum": (lambda p: rewritten(p, lambda m, _: m.pop("crc32"), sealed=False), "CRC-32"),
    "only SHA-256": (lambda p: rewritten(p, in_place_of_crc32, sealed=False), "CRC-32"),
    "checksum too long": (lambda p: rewritten(p, lambda m, _: m.update(crc32="0" * 10**5), sealed=False), "CRC-32"),
    "altered config": (lambda p: rewritten(p, edit("config", alpha=1.0), sealed=False), "altered"),
    "altered bases": (lambda p: rewritten(p, edit("bases", seed=1), sealed=False), "altered"),
    "altered targets": (lambda p: rewritten(p, targets(json.dumps(LISTED[::-1])), sealed=False), "altered"),
    "unknown key": (lambda p: rewritten(p, edit("config", rnak=3)), "unknown key 'rnak'.*close matches: rank"),
    "bad value": (lambda p: rewritten(p, edit("config", rank=-1)), "rank must be an integer"),
    "config no json": (lambda p: rewritten(p, lambda m, _: m.update(config="{")), "malformed metadata"),
    "config missing": (lambda p: rewritten(p, lambda m, _: m.pop("config")), "malformed metadata"),
    "config nested": (lambda p: rewritten(p, lambda m, _: m.update(config="[" * 200_000)), "malformed metadata"),
    "targets nested": (lambda p: rewritten(p, targets("[" * 200_000)), "malformed metadata"),
    "targets bomb": (lambda p: rewritten(p, targets("[" + " " * 2**27 + "]")), "malformed metadata"),
    "targets base64": (lambda p: rewritten(p, lambda m, _: m.update(targets="???")), "malformed metadata"),
    "targets zlib": (lambda p: rewritten(p, lambda m, _: m.update(targets="AAAA")), "malformed metadata"),
    "targets number": (lambda p: rewritten(p, targets("5")), "malformed metadata"),
    "rank zero": (lambda p: rewritten(p, targets(json.dumps([["0", 16, 8, 0, 1.0], LISTED[1]]))), "malformed|rank"),
    "bases no object": (lambda p: rewritten(p, lambda m, _: m.update(bases='"x"')), "malformed metadata"),
    "bases kind": (lambda p: rewritten(p, edit("bases", kind="zz")), "bases"),
    "bases huge": (lambda p: rewritten(p, edit("bases", wide=2**40)), "bases"),
    "bases negative": (lambda p: rewritten(p, edit("bases", rank=-1)), "bases"),
    "bases seed type": (lambda p: rewritten(p, edit("bases", seed="x")), "bases"),
    "bases checksum": (lambda p: rewritten(p, edit("bases", crc32="0" * 8)), "bases.*CRC-32 .*, expected 00000000"),
    "bases checksum type": (lambda p: rewritten(p, edit("bases", crc32=None)), "malformed|bases"),
    "bases seed": (lambda p: rewritten(p, bases_of_another_seed), "bases|seed"),
    "missing tensor": (lambda p: rewritten(p, lambda _, t: t.pop(f"gamma.{GROUP}")), f"missing.*gamma.{GROUP}"),
    "extra tensor": (lambda p: rewritten(p, lambda _, t: t.update(a=torch.zeros(2))), "unexpected.*'a'"),
    "extra saved": (lambda p: rewritten(p, lambda _, t: t.update({"saved.0.bias": torch.zeros(16)})), "0.bias"),
    "shape": (lambda p: rewritten(p, lambda _, t: t.update({f"gamma.{GROUP}": torch.zeros(1, 4, 9)})), "shapes"),
    "integers": (
        lambda p: rewritten(p, lambda _, t: t.update({f"gamma.{GROUP}": torch.zeros(1, 4, 8).int()})),
        "dtype",
    ),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_clear_error_and_the_model_is_untouched(tmp_path: Path, case: str) -> None:
    damage, message = BAD_FILES[case]
    path = saved(tmp_path)
    damage(path)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert snapshot(model) == before


def test_damage_is_named_rather_than_what_follows_from_it(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff" * 4  # a value that is not a number
    path.write_bytes(data)
    for model in (mlp(), vit(depth=1)):
        with pytest.raises(ValueError, match="altered or damaged"):
            load_adapter(model, path)


def test_targets_in_another_order_are_still_the_right_ones(tmp_path: Path) -> None:
    model, fresh = mlp(), mlp()
    path = rewritten(saved(tmp_path, model), targets(json.dumps(LISTED[::-1])))
    load_adapter(fresh, path)
    assert torch.equal(fresh(X), model(X))


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fewer": (lambda: vit(depth=1), "file's targets are not in the model"),
    "wider": (lambda: vit(width=48), r"blocks.0.attn.qkv is .*144.* in the model and .*96.* in the file"),
    "head": (lambda: vit(classes=7), "head.(bias|weight) is .*7.* in the model and .*5.* in the file"),
    "class": (mlp, "does not fit this Sequential"),
    "empty": (lambda: nn.Sequential(nn.ReLU()), "does not fit this Sequential"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_model_is_refused_and_untouched(tmp_path: Path, case: str) -> None:
    make, message = WRONG[case]
    path = saved(tmp_path, vit(), RandLoRAConfig(rank=4, modules_to_save=["head"]))
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, path)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


def test_a_file_adapts_exactly_what_it_lists(tmp_path: Path) -> None:
    """A deeper model with another head: what the file does not list stays the base's."""
    config = RandLoRAConfig(rank=4, modules_to_save=["norm"], target_modules="timm:backbone", alpha_pattern={"fc1": 9})
    model = vit(depth=2)
    inject(model, config)
    randomize(model)
    with torch.no_grad():
        model.norm.weight.add_(1)
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    deep = vit(depth=3, classes=7, seed=5)
    deep.norm.extra = nn.Parameter(torch.ones(3))
    base = copy.deepcopy(deep)
    report = load_adapter(deep, path, trainable=True)
    assert {t.name for t in report.targets} == {t.name for t in plan(vit(depth=2), config).targets}
    assert report.skipped == tuple(
        (f"blocks.2.{name}", "not in the file") for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    )
    assert "skipped (not in the file): blocks.2.attn.qkv" in str(report)
    dense = dense_model(base, deep, report)
    with torch.no_grad():
        dense.norm.weight.copy_(model.norm.weight)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(deep(x), dense(x.double()).float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(deep(x), base(x), atol=1e-2)
    trained = {name for name, parameter in deep.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "_randlora_" not in name} == {"norm.weight", "norm.bias"}
    assert not any(name.startswith("blocks.2.") for name in trained)
    again = save_adapter(deep, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    remove(deep)
    assert torch.equal(deep(x), base(x))


def test_what_the_model_lacks_is_counted(tmp_path: Path) -> None:
    path = saved(tmp_path, vit(depth=3), RandLoRAConfig(rank=4, modules_to_save=["head"]))
    with pytest.raises(
        ValueError, match=r": 4 of the file's targets are not in the model \(blocks.2.attn.proj, .* and 1 "
    ):
        load_adapter(vit(depth=2), path)
    headless = vit(depth=3, classes=0)
    with pytest.raises(ValueError, match=r"2 of the file's tensors .* are not in the model \(head.bias, head.weight\)"):
        load_adapter(headless, path)


def test_a_listed_weight_that_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = mlp()
    model[0] = nn.LazyLinear(16)
    with pytest.raises(ValueError, match="0 cannot be adapted: its weight is not initialised yet"):
        load_adapter(model, path)


def test_two_listed_tensors_that_are_one_in_the_model_are_refused(tmp_path: Path) -> None:
    """Untied in training, tied here: one of the two would be lost."""

    def make() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))

    path = saved(tmp_path, make(), RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2"]))
    tied = make()
    tied[2].weight = tied[1].weight
    with pytest.raises(
        ValueError, match=r"in the model, 2.weight is not|1 of the file's tensors .*2.weight|same tensor"
    ):
        load_adapter(tied, path)
    tied = make()
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="not in the model|the same tensor as"):
        load_adapter(tied, path)
    path = saved(tmp_path, make(), RandLoRAConfig(rank=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"1 of the file's targets are not in the model \(1\)"):
        load_adapter(tied, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    from randlora_vision.integrations import peft

    for place in ("0.weight_randlora_lambda_default", "2.weight_randlora_gamma_default", "2.bias"):
        model = mlp()
        inject(model, RandLoRAConfig(rank=2, target_modules=["0", "2"], modules_to_save=["2.bias"]))
        with torch.no_grad():
            model.get_parameter(place).view(-1)[-1] = value
        for save in (save_adapter, peft.export):
            with pytest.raises(ValueError, match=r"adapter 'default': .*(0|2|2.bias) holds NaN or infinity"):
                save(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    from randlora_vision.adapters.arithmetic import weighted_sum, weighted_sum_files

    model = mlp()
    path = saved(tmp_path, model)
    with pytest.raises(ValueError, match="the sum: lambda of 0 holds NaN or infinity: the weights are too large"):
        weighted_sum_files({path: 1e60}, tmp_path / "sum.safetensors")
    with pytest.raises(ValueError, match="the weights are too large"):
        weighted_sum(model, {"default": 1e60}, "sum")


def test_loading_does_not_change_the_base(tmp_path: Path) -> None:
    model, base = vit(), vit()
    load_adapter(model, saved(tmp_path, vit(), RandLoRAConfig(rank=4)))
    for name, tensor in base.state_dict().items():
        assert tensor_bytes(model.state_dict()[name]) == tensor_bytes(tensor)


@pytest.mark.parametrize("bases", ["uniform", "sparse", "peft"])
def test_loading_plans_once_scans_once_and_draws_once(
    bases: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))
    inject(model, RandLoRAConfig(rank=4, bases=bases))
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    x = torch.randn(3, 12)
    expected = model(x)
    remove(model)
    gc.collect()  # the bases live as long as an adapter uses them
    counts: Counter[str] = Counter()

    def count(target: str, what: str) -> None:
        module, _, name = target.rpartition(".")
        original = getattr(importlib.import_module(module), name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[what] += 1
            return original(*args, **options)

        monkeypatch.setattr(target, counted)

    count("randlora_vision.adapters.checkpoint.make_plan", "plans")
    count("randlora_vision.injection.selection.candidates", "scans")
    count("randlora_vision.bases.dense.filled", "matrices")
    count("randlora_vision.bases.ternary.filled", "matrices")
    count("randlora_vision.bases.peft.draw", "pairs")
    load_adapter(model, path)
    assert torch.equal(model(x), expected)
    drawn = {"pairs": 1} if bases == "peft" else {"matrices": 2}  # A and B
    assert counts == {"plans": 1, "scans": 1, **drawn}
