"""The `randlora` command: its output, files and exit codes, compared with direct calls of the library."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import randlora_vision
from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter
from randlora_vision.bases import BasesSpec
from randlora_vision.checksums import CRC32, Checksum
from randlora_vision.cli import main
from randlora_vision.files import adapter_file
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.report import Target
from tests.helpers import dense_weights, randomize

NAME = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = dict(img_size=32, embed_dim=24, depth=1, num_heads=2)
MODEL = ["--model", NAME, "--model-args", json.dumps(OPTIONS)]


def base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5, **OPTIONS).eval()


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[nn.Module, Path]:
    return saved(tmp_path / "adapter.safetensors")


def saved(path: Path, **settings: Any) -> tuple[nn.Module, Path]:
    model = base()
    config = RandLoRAConfig(rank=4, target_modules=["qkv", "fc1"], modules_to_save=["head"], seed=2, **settings)
    inject(model, config)
    randomize(model)
    nn.init.normal_(model.head.weight)
    return model, save_adapter(model, path)


def run(*arguments: str | Path) -> int:
    """Call the command and return its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_version_needs_no_library_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # an import of it raises ModuleNotFoundError
    with pytest.raises(SystemExit):
        main(["info", "x"])
    assert "needs rich" in capsys.readouterr().err
    assert main(["--version"]) is None
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["randlora_vision"] == randlora_vision.__version__ and printed["timm"] == timm.__version__


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    """Exit code and the JSON that is all of stdout."""
    capsys.readouterr()
    code = run(*arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a call with bad input."""
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_info(adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = adapted
    code, found = answer(capsys, "info", path, "--plot", tmp_path / "spectra.png")
    assert code == 0 and found["bytes"] == path.stat().st_size
    plain = base()
    planned = inject(base(), found_config := RandLoRAConfig.from_dict(found["parts"][""]["config"]))
    assert found_config.seed == 2 and found["parts"][""]["saved"] == {"head.bias": [5], "head.weight": [5, 24]}
    assert len(found["parts"][""]["bases_crc32"]) == 8
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert list(layers) == [target.name for target in planned.targets]
    assert found["parameters"] == sum(target.num_parameters for target in planned.targets)
    for path_, weight in dense_weights(plain, model.state_dict(), planned).items():
        values = torch.linalg.svdvals((weight - plain.get_parameter(path_).double()).detach())
        shares = values / values.sum()
        layer = layers[path_.removesuffix(".weight")]
        assert layer["norm"] == pytest.approx(float(values.norm()), rel=1e-5)
        entropy = -(shares * shares.log()).sum()
        assert layer["effective_rank"] == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert run("info", path) == 0
    table = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in table and "72 x 24" in table and "trained in full" in table


def test_info_groups_layers_that_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model(NAME, num_classes=5, **OPTIONS | {"depth": 3, "mlp_ratio": 1}).eval()
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv", "fc1", "fc2"], rank_pattern={"blocks.2.mlp.fc1": 6}))
    randomize(model)
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    _, found = answer(capsys, "info", path)
    norms = [layer["norm"] for layer in found["layers"] if "qkv" in layer["name"]]
    assert len(found["layers"]) == 9 and run("info", path) == 0
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if "blocks." in line[:12]}
    # The layer of another rank stands alone, and so do layers of other names.
    assert set(rows) == {"blocks.*.attn.qkv (x3)", "blocks.*.mlp.fc1 (x2)", "blocks.2.mlp.fc1", "blocks.*.mlp.fc2 (x3)"}
    assert f"{min(norms):.4g} to {max(norms):.4g}" in rows["blocks.*.attn.qkv (x3)"]
    total = sum(layer["parameters"] for layer in found["layers"] if "qkv" in layer["name"])
    assert f" {total:,} " in rows["blocks.*.attn.qkv (x3)"] and "9 layers" in printed
    assert run("info", path, "--all") == 0
    assert "blocks.1.attn.qkv" in capsys.readouterr().out


def test_info_of_a_fresh_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = base()
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"]))
    path = save_adapter(model, tmp_path / "fresh.safetensors")
    _, found = answer(capsys, "info", path, "--plot", tmp_path / "spectra.png")
    assert found["layers"][0]["norm"] == found["layers"][0]["effective_rank"] == 0


def test_targets_is_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(capsys, "targets", NAME, "--target-modules", "timm:backbone", "--rank", "16")
    assert code == 0 and len(found["targets"]) == 48 and found["config"]["rank"] == 16
    _, found = answer(capsys, "targets", "open_clip:ViT-B-32", "--target-modules", "in_proj_weight")
    assert len(found["targets"]) == 24 and found["base_parameters"] == 151_277_313
    _, found = answer(capsys, "targets", NAME, "--target-modules", r"blocks\.[0-3]\.attn\.qkv")
    assert len(found["targets"]) == 4
    assert run("targets", NAME) == 0
    assert "skipped (classifier head): head" in capsys.readouterr().out


def test_targets_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_pipelines import PIPELINES

    PIPELINES["sd15"]().save_pretrained(tmp_path / "pipe")
    options = ("--target-modules", "all-linear", "--rank", "4")
    _, found = answer(capsys, "targets", tmp_path / "pipe", *options)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in {t["name"] for t in found["targets"]}
    _, found = answer(capsys, "targets", tmp_path / "pipe", *options, "--component", "text_encoder")
    assert "encoder.layers.1.mlp.fc2" in {target["name"] for target in found["targets"]}
    _, alone = answer(capsys, "targets", tmp_path / "pipe" / "unet", *options)
    assert len(alone["targets"]) > 40
    error = complaint(capsys, "targets", tmp_path / "pipe", "--component", "transformer")
    assert "has no component 'transformer': " in error and "unet" in error


def test_merge(adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = adapted
    plain = timm.create_model(NAME, num_classes=7, **OPTIONS)  # pretrained for other classes
    plain.load_state_dict({k: v for k, v in base().state_dict().items() if "head" not in k}, strict=False)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "base.safetensors")
    output = tmp_path / "merged.safetensors"
    weights = ["--weights", tmp_path / "base.safetensors", "--model-args", json.dumps(OPTIONS)]
    code, found = answer(capsys, "merge", NAME, path, output, *weights)
    assert code == 0 and found["layers"] == 2 and found["output"] == str(output)
    merged = timm.create_model(NAME, num_classes=5, checkpoint_path=str(output), **OPTIONS).eval()
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-5)
    error = complaint(capsys, "merge", NAME, path, output)
    assert "would be built with random weights" in error


def test_weights_of_another_size_or_that_lack_some(
    adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = adapted
    file, smaller = tmp_path / "base.safetensors", {**OPTIONS, "img_size": 16}
    state = timm.create_model(NAME, num_classes=7, **OPTIONS).state_dict()
    safetensors.torch.save_file(state, file)
    given = ["--weights", file, "--model-args"]
    code, _ = answer(capsys, "merge", NAME, path, tmp_path / "m.safetensors", *given, json.dumps(smaller))
    assert code == 0
    overlay = {"file": str(file), "num_classes": 7, "custom_load": False}
    expected = timm.create_model(NAME, num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay, **smaller).eval()
    load_adapter(expected, path)
    merged = timm.create_model(NAME, num_classes=5, checkpoint_path=str(tmp_path / "m.safetensors"), **smaller).eval()
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    torch.testing.assert_close(merged(x), expected(x), atol=1e-5, rtol=1e-5)
    headless = base()
    inject(headless, RandLoRAConfig(rank=4, target_modules=["qkv"]))
    alone = save_adapter(headless, tmp_path / "alone.safetensors")
    words = json.dumps({**OPTIONS, "num_classes": 5})  # whose classifier neither file has
    error = complaint(capsys, "merge", NAME, alone, tmp_path / "n.safetensors", *given, words)
    assert "has a classifier of 7 classes, but --model-args says num_classes 5" in error
    safetensors.torch.save_file({name: value for name, value in state.items() if name != "norm.weight"}, file)
    error = complaint(capsys, "merge", NAME, path, tmp_path / "n.safetensors", *given, json.dumps(OPTIONS))
    assert "base.safetensors does not fit the model" in error and "norm.weight" in error


def test_convert(adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    error = complaint(capsys, "convert", adapted[1], tmp_path / "peft", "--to", "peft", *MODEL)
    assert "need a different B for each layer shape (for PEFT, train with bases='uniform'" in error
    model, path = saved(tmp_path / "uniform.safetensors", bases="uniform")
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    code, _ = answer(capsys, "convert", path, tmp_path / "peft", "--to", "peft", *MODEL)
    assert code == 0
    back = tmp_path / "back.safetensors"
    args = json.dumps({**OPTIONS, "num_classes": 5})
    code, _ = answer(
        capsys, "convert", tmp_path / "peft", back, "--to", "randlora", "--model", NAME, "--model-args", args
    )
    again = base()
    load_adapter(again, back)
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)
    _, found = answer(capsys, "convert", path, tmp_path / "lora", "--to", "lora-peft", "--rank", "24", *MODEL)
    assert found["error"] < 1e-5 and {layer["rank"] for layer in found["layers"]} == {24}
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval()(x), model(x), atol=1e-4, rtol=1e-4
    )
    assert run("convert", path, tmp_path / "cut", "--to", "lora-peft", "--energy", "0.5", *MODEL) == 0
    assert "relative error of all layers" in capsys.readouterr().out
    error = complaint(
        capsys, "convert", path, tmp_path / "x.safetensors", "--to", "lora-diffusers", "--rank", "2", *MODEL
    )
    assert "cannot hold modules trained in full" in error
    error = complaint(capsys, "convert", path, tmp_path / "x", "--to", "peft", "--rank", "2", *MODEL)
    assert "--rank and --energy are for lora-*" in error


def test_convert_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_pipelines import PIPELINES, sample

    pipe = PIPELINES["sd15"]()
    pipe.save_pretrained(tmp_path / "pipe")
    inject(pipe.unet, RandLoRAConfig(rank=4, target_modules=["to_q", "to_v"]))
    randomize(pipe.unet)
    adapter = save_adapter(pipe.unet, tmp_path / "adapter.safetensors")
    lora = tmp_path / "lora.safetensors"
    arguments = ("convert", adapter, lora, "--to", "lora-kohya", "--energy", "1", "--model", tmp_path / "pipe")
    code, found = answer(capsys, *arguments)
    assert code == 0 and found["format"] == "kohya" and found["error"] < 1e-5
    loaded = PIPELINES["sd15"]()
    loaded.load_lora_weights(lora)
    torch.testing.assert_close(sample(loaded), sample(pipe), atol=1e-4, rtol=1e-4)
    assert answer(capsys, "merge", tmp_path / "pipe", adapter, tmp_path / "merged")[1]["library"] == "diffusers"
    assert (tmp_path / "merged" / "model_index.json").is_file()


def test_verify(adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = adapted
    code, found = answer(capsys, "verify", path, *MODEL)
    assert code == 0 and found["passed"]
    assert [check["check"] for check in found["checks"]] == ["file", "bases", "model"]

    other = ["--model", NAME, "--model-args", json.dumps({**OPTIONS, "embed_dim": 48})]
    code, found = answer(capsys, "verify", path, *other)
    assert code == 1 and [check["passed"] for check in found["checks"]] == [True, True, False]
    assert "does not fit this VisionTransformer" in found["checks"][-1]["detail"]

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    code, found = answer(capsys, "verify", tmp_path / "altered.safetensors", *MODEL)
    assert code == 1 and [check["passed"] for check in found["checks"]] == [False]
    assert "altered or damaged" in found["checks"][0]["detail"]
    assert run("verify", tmp_path / "altered.safetensors", *MODEL) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_finds_what_is_not_finite(
    adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = adapted
    content = adapter_file.read(path)
    content.trained["blocks.0.attn.qkv"][1][0, 0] = torch.nan
    rewrite(path, content)
    code, found = answer(capsys, "verify", path, *MODEL)
    assert code == 1 and not found["passed"]
    assert "holds NaN or infinity" in found["checks"][-1]["detail"]


def rewrite(path: Path, content: AdapterFile) -> Path:
    """Write what `save_adapter` would refuse to write."""
    assert content.bases_checksum is not None
    crc32 = content.bases_checksum.digits
    packed = adapter_file.pack(content.config, content.spec, crc32, content.targets, content.trained, content.saved)
    adapter_file.write(path, *packed)
    return path


def claiming(path: Path, rows: int, narrow: int, rank: int, kind: str) -> Path:
    """A file of one layer whose wide side is only claimed; its bases' digest is wrong."""
    bases = -(-narrow // rank)
    name = "0"
    targets = (Target(name, "linear", (rows, narrow), rank, 20.0 * rank, bases),)
    trained = {name: (torch.ones(rank, bases), torch.ones(bases, narrow))}
    spec = BasesSpec(kind, 0, rank, narrow, rows, rank * bases)
    config = RandLoRAConfig(rank=rank, target_modules=["0"], bases=kind)
    return rewrite(path, AdapterFile(config, spec, Checksum(CRC32, "0" * 8), targets, trained, {}))


@pytest.mark.parametrize("kind", ["uniform", "structured"])
@pytest.mark.parametrize(("rows", "narrow", "rank"), [(10**6, 500, 250), (10**7, 2000, 2000), (2**40, 1, 1)])
def test_info_makes_no_bases_that_a_small_file_only_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, narrow: int, rank: int, kind: str
) -> None:
    path = claiming(tmp_path / "a.safetensors", rows, narrow, rank, kind)
    assert path.stat().st_size < 20_000
    started = time.process_time()
    error = complaint(capsys, "info", path)
    assert f"claims bases of {rows:,} x" in error and time.process_time() - started < 5
    code, found = answer(capsys, "verify", path, *MODEL)
    assert code == 1 and [check["passed"] for check in found["checks"]] == [True, False, False]


def test_info_on_a_file_of_an_older_version(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "golden/uniform.safetensors"
    _, found = answer(capsys, "info", path)
    assert len(digits := found["parts"][""]["bases_sha256"]) == 64
    assert run("info", path) == 0
    printed = capsys.readouterr().out
    assert "bases' SHA-256" in printed and digits[:20] in printed


@pytest.mark.parametrize("kind", ["uniform", "structured"])
def test_info_checks_the_checksum_of_the_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = claiming(tmp_path / "a.safetensors", 12, 6, 3, kind)
    assert "are not those that the adapter was trained with" in complaint(capsys, "info", path)


def test_names_are_printed_without_control_characters_or_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\u202e\n[bold]b[/bold]"
    model = nn.ModuleDict({"[red]c": nn.Linear(8, 8)})
    model.add_module(name, nn.Linear(8, 8))
    inject(model, RandLoRAConfig(rank=2))
    path = save_adapter(model, tmp_path / "[green]\x1b.safetensors")
    assert run("info", path) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed
    assert r"a\x1b[31m\u202e\n[bold]b[/bold]" in printed and "[red]c" in printed and "[green]" in printed
    _, found = answer(capsys, "info", path)
    assert name in {layer["name"] for layer in found["layers"]}
    error = complaint(capsys, "verify", tmp_path / "\x1b[2Jgone.safetensors", *MODEL)
    assert "\x1b" not in error


def test_bad_input_is_one_line_and_exit_code_2(
    adapted: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = adapted
    gone = tmp_path / "gone.safetensors"
    assert "no adapter file" in complaint(capsys, "info", gone)
    assert "is a folder" in complaint(capsys, "info", tmp_path)
    assert "writes a .png" in complaint(capsys, "info", path, "--plot", tmp_path / "x.pdf")
    assert "no adapter file" in complaint(capsys, "verify", gone, *MODEL)
    assert "no adapter file" in complaint(
        capsys, "merge", NAME, gone, tmp_path / "m.safetensors", "--weights", "pretrained"
    )
    error = complaint(capsys, "targets", "vit_tiny_patch16_225")
    assert "timm has no model 'vit_tiny_patch16_225'" in error and NAME in error
    assert "open_clip has no model 'ViT-B-33'; close" in complaint(capsys, "targets", "open_clip:ViT-B-33")
    assert "must be a JSON object, got '[1]'" in complaint(capsys, "targets", NAME, "--model-args", "[1]")
    assert "leaves nothing to adapt" in complaint(capsys, "targets", NAME, "--target-modules", "to_q")
    assert "--component is for diffusers pipelines" in complaint(capsys, "targets", NAME, "--component", "unet")
    assert "diffusers cannot build the model" in complaint(capsys, "targets", f"diffusers:{tmp_path}")
    text = complaint(capsys, "merge", NAME, path, tmp_path / "m.safetensors", "--weights", tmp_path / "w.safetensors")
    assert "no file" in text and "--weights" in text
    (tmp_path / "w.bin").write_bytes(b"")
    text = complaint(capsys, "merge", NAME, path, tmp_path / "m.safetensors", "--weights", tmp_path / "w.bin")
    assert "only .safetensors files are read" in text
    assert not (tmp_path / "m.safetensors").exists()
    assert "invalid choice: 'lora-a1111'" in complaint(capsys, "convert", path, "out", "--to", "lora-a1111", *MODEL)


def test_without_rich_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # what an import of a missing module finds
    error = complaint(capsys, "info", "x")
    assert error == "error: the randlora command needs rich: pip install 'randlora_vision[cli]'\n"
