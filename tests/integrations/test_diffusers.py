"""Adapters in pipelines: files, scales, fusing and removal, against plain pipelines with the dense updates added."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import randlora_vision
from randlora_vision import RandLoRAConfig, adapter_parameters, inject
from randlora_vision.integrations import diffusers as integration
from tests.adapter_files import seal
from tests.helpers import randomize, snapshot
from tests.layers.test_zoo import assert_same
from tests.pipeline_helpers import adapt, deltas, denoiser, difference, plain, scaled, text_encoders
from tests.tiny_pipelines import PIPELINES, sample

CLOSE = 2e-3  # pixels in [0, 1]: the effect of rounded weights on the output of the network


@pytest.fixture(params=PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_an_adapter_from_injection_to_removal(family: str, tmp_path: Path) -> None:
    pipe = PIPELINES[family]()
    base = sample(pipe)
    reports = adapt(pipe)
    image = sample(pipe)
    assert difference(image, sample(plain(family, deltas(pipe, reports)))) < CLOSE
    only_denoiser = plain(family, {n: d for n, d in deltas(pipe, reports).items() if not n.startswith("text_encoder")})
    assert difference(image, base) > 0.1 and difference(image, sample(only_denoiser)) > 0.1
    path = integration.save_adapter(pipe, tmp_path / "adapter.safetensors")

    other = PIPELINES[family]()
    sample(other)  # models cache values in their first run
    before = {name: snapshot(part) for name, part in parts(other).items()}
    loaded = integration.load_adapter(other, path)
    assert loaded.keys() == reports.keys() == {name for name in parts(other) if name != "vae"}
    assert torch.equal(sample(other), image)
    with integration.disabled(other):
        assert torch.equal(sample(other), base)
    integration.fuse(other)
    assert difference(sample(other), image) < CLOSE
    with integration.disabled(other):
        assert torch.equal(sample(other), base)
    with pytest.raises(ValueError, match="'default' is merged into .*text_encoder.*unfuse it first"):
        integration.delete_adapter(other, "default")
    integration.unfuse(other)
    assert torch.equal(sample(other), image)
    integration.delete_adapter(other, "default")
    assert torch.equal(sample(other), base) and integration.list_adapters(other) == {}
    for name, part in parts(other).items():
        assert_same(snapshot(part), before[name])


def parts(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def test_two_adapters_add_up_by_their_scales(family: str) -> None:
    pipe = PIPELINES[family]()
    first, second = (deltas(pipe, adapt(pipe, name=name, seed=seed)) for name, seed in (("a", 0), ("b", 7)))
    name = next(iter(integration.list_adapters(pipe)))
    block = next(iter(first)).split(".")[1]
    integration.set_scales(pipe, {"a": 0.5, "b": {name: {block: -0.25}, "text_encoder": 0.0}})
    half = scaled(first, 0.5)
    rest = scaled(scaled(second, -0.25, f"{name}.{block}."), 0.0, "text_encoder.")
    assert difference(sample(pipe), sample(plain(family, half, rest))) < CLOSE
    integration.fuse(pipe, "b")
    assert difference(sample(pipe), sample(plain(family, half, rest))) < CLOSE
    integration.set_scales(pipe, 0.0, "a")
    assert difference(sample(pipe), sample(plain(family, rest))) < CLOSE


def test_the_longest_prefix_of_whole_components_holds() -> None:
    pipe = PIPELINES["sdxl"]()
    adapt(pipe, text=False)
    integration.set_scales(pipe, {"unet": {"up_blocks.0": 0.5, "up_blocks.0.attentions.1": 0.25}}, "default")
    found: dict[float, set[str]] = {}
    for path, _, _, state in randlora_vision.layers.adapted.adapted_modules(pipe.unet):
        found.setdefault(state.slots["default"].scale, set()).add(".".join(path.split(".")[:4]))
    assert found[0.5] == {"up_blocks.0.attentions.0"} and found[0.25] == {"up_blocks.0.attentions.1"}
    assert not any(name.startswith("up_blocks.0") for name in found[1.0]) and found.keys() == {0.5, 0.25, 1.0}


BAD_SCALES: dict[str, tuple[Any, Any, str]] = {
    "nan": ({"unet": 0.5, "text_encoder": float("nan")}, "default", "finite"),
    "text": ("x", "default", "finite"),
    "no adapter": (0.5, "other", "no adapter 'other'.*default"),
    "no adapter in a mapping": ({"default": 0.5, "other": 1}, None, "no adapter 'other'"),
    "component without adapter name": ({"unet": 0.5}, None, "got components: 'unet'; name the adapter"),
    "component": ({"unet": 0.5, "vae": 1}, "default", "'vae' is not among the components.*unet, text_encoder"),
    "block": ({"unet": {"down_blocks": 0.5, "down": 1}}, "default", "in 'down'; .*down_blocks"),
}


@pytest.fixture(scope="module")
def unchanged() -> tuple[Any, torch.Tensor]:
    """An adapted pipeline, and its picture."""
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    return pipe, sample(pipe)


@pytest.mark.parametrize("case", BAD_SCALES)
def test_a_bad_scale_changes_none(case: str, unchanged: tuple[Any, torch.Tensor]) -> None:
    pipe, image = unchanged
    scales, name, message = BAD_SCALES[case]
    with pytest.raises(ValueError, match=message):
        integration.set_scales(pipe, scales, name)
    assert torch.equal(sample(pipe), image)


def test_a_denoiser_alone_is_the_file_of_the_core(tmp_path: Path) -> None:
    pipe = PIPELINES["flux"]()
    adapt(pipe, text=False)
    path = integration.save_adapter(pipe, tmp_path / "a.safetensors")
    core = randlora_vision.save_adapter(pipe.transformer, tmp_path / "b.safetensors")
    assert path.read_bytes() == core.read_bytes()
    other = PIPELINES["flux"]()
    assert integration.load_adapter(other, tmp_path / "b.safetensors", scale=0.5).keys() == {"transformer"}
    integration.set_scales(pipe, 0.5)
    assert torch.equal(sample(other), sample(pipe))


def test_an_adapter_of_one_encoder_finds_its_place(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3"]()
    config = RandLoRAConfig(rank=4, target_modules="diffusers:text")
    inject(pipe.text_encoder_2, config)
    randomize(pipe.text_encoder_2)
    inject(pipe.text_encoder_3, config, "t5")
    randomize(pipe.text_encoder_3)
    integration.save_adapter(pipe, tmp_path / "named.safetensors")
    randlora_vision.save_adapter(pipe.text_encoder_2, tmp_path / "core.safetensors")
    randlora_vision.save_adapter(pipe.text_encoder_3, tmp_path / "t5.safetensors", "t5")
    other = PIPELINES["sd3"]()
    integration.load_adapter(other, tmp_path / "named.safetensors", "named")
    with pytest.raises(ValueError, match="fits text_encoder, text_encoder_2: choose one with component='text_encoder'"):
        integration.load_adapter(other, tmp_path / "core.safetensors")
    integration.load_adapter(other, tmp_path / "core.safetensors", "first", component="text_encoder")
    integration.load_adapter(other, tmp_path / "t5.safetensors", "t5")
    assert integration.list_adapters(other) == {
        "text_encoder": ["first"],
        "text_encoder_2": ["named"],
        "text_encoder_3": ["t5"],
    }
    integration.delete_adapter(other, "first")
    assert torch.equal(sample(other), sample(pipe))


def test_nothing_is_loaded_if_one_part_does_not_fit(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    path = integration.save_adapter(pipe, tmp_path / "adapter.safetensors")
    taken = PIPELINES["sd15"]()
    inject(taken.text_encoder, RandLoRAConfig(rank=4, target_modules="diffusers:text"))
    before = snapshot(taken.unet)
    with pytest.raises(ValueError, match=r"\(text_encoder\).*already has an adapter 'default'"):
        integration.load_adapter(taken, path)
    assert snapshot(taken.unet) == before
    fresh = PIPELINES["sd15"]()
    with pytest.raises(ValueError, match="finite"):
        integration.load_adapter(fresh, path, scale=float("inf"))
    assert integration.list_adapters(fresh) == {}
    for other, message in (("flux", "is for 'unet', but this pipeline has: transformer"), ("sdxl", "does not fit")):
        with pytest.raises(ValueError, match=message):
            integration.load_adapter(PIPELINES[other](), path)
    with pytest.raises(ValueError, match="components of a pipeline: load it with .*integrations.diffusers"):
        randlora_vision.load_adapter(PIPELINES["sd15"]().unet, path)


def test_a_failing_fuse_leaves_no_part_fused() -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    image = sample(pipe)
    broken = dict(adapter_parameters(pipe.text_encoder))
    with torch.no_grad():
        next(iter(broken.values())).fill_(float("nan"))
    before = snapshot(pipe.unet)
    with pytest.raises(ValueError, match="non-finite"):
        integration.fuse(pipe)
    assert snapshot(pipe.unet) == before
    with torch.no_grad():
        next(iter(broken.values())).zero_()
    integration.fuse(pipe, "default")
    assert difference(sample(pipe), image) > 0


def test_folders_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    image = sample(pipe)
    integration.save_adapter(pipe, tmp_path / "one" / "any.safetensors")
    integration.save_adapter(pipe, tmp_path / "two" / "adapter.safetensors")
    (tmp_path / "two" / "another.safetensors").write_bytes(b"")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if repository == "nobody/there":
            raise OSError("offline\nsecond line")
        return str(tmp_path / "one" / "any.safetensors")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in (tmp_path / "one", str(tmp_path / "two"), "owner/name", "owner/name/sub/file.safetensors"):
        other = PIPELINES["sd15"]()
        integration.load_adapter(other, source)
        assert torch.equal(sample(other), image)
    assert asked == [("owner/name", "adapter.safetensors"), ("owner/name", "sub/file.safetensors")]
    (tmp_path / "two" / "adapter.safetensors").rename(tmp_path / "two" / "third.safetensors")
    (tmp_path / "none").mkdir()
    cases = {
        "nobody/there": "'nobody/there'.*could not be downloaded from the Hugging Face Hub: offline second line$",
        str(tmp_path / "two"): "one adapter.*another.safetensors, third.safetensors",
        str(tmp_path / "none"): "it holds: none",
        str(tmp_path / "gone.safetensors"): "no adapter file",
        "gone.safetensors": "no adapter file 'gone.safetensors'",
        "folder/gone.safetensors": "no adapter file",
    }
    for source, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            integration.load_adapter(other, source, "more")


def test_a_peft_folder_goes_into_the_denoiser(tmp_path: Path) -> None:
    from peft import RandLoraConfig, get_peft_model

    pipe = PIPELINES["sd15"]()
    config = RandLoraConfig(r=4, target_modules=["to_q", "to_v"], save_projection=True)
    wrapped = get_peft_model(PIPELINES["sd15"]().unet, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "randlora_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(tmp_path)
    assert integration.load_adapter(pipe, tmp_path).keys() == {"unet"}
    image = sample(pipe)
    pipe.unet = wrapped.merge_and_unload()
    assert difference(sample(pipe), image) < CLOSE


def test_bundles_are_deterministic_and_checked(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe)
    path = integration.save_adapter(pipe, tmp_path / "a.safetensors")
    again = integration.save_adapter(pipe, tmp_path / "b.safetensors")
    assert path.read_bytes() == again.read_bytes()
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["format_version"] == "3"
    parts = json.loads(metadata["parts"])
    lambdas = next(name for name in tensors if name.startswith("text_encoder/lambda"))
    changed = {**tensors, lambdas: tensors[lambdas] + 1}
    extra = {**tensors, "vae/x": torch.ones(1)}

    def with_parts(parts: Any, tensors: dict[str, Any] = tensors) -> dict[str, str]:
        changed = {**metadata, "parts": json.dumps(parts)}
        seal(tensors, changed)
        return changed

    bad: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
        "tensor": (changed, metadata, "altered"),
        "parts": (tensors, {**metadata, "parts": json.dumps({"unet": parts["unet"]})}, "altered"),
        "extra tensor": (extra, with_parts(parts, extra), "unexpected vae/x"),
        "no parts": (tensors, with_parts({}), "malformed"),
        "list": (tensors, with_parts(["unet"]), "malformed"),
        "strange name": (tensors, with_parts({"a/b": {}}), "malformed"),
        "no metadata": (tensors, with_parts({**parts, "unet": {}}), "malformed.*it lacks config, bases, targets"),
    }
    target = PIPELINES["sd15"]()
    for kind, (held, described, message) in bad.items():
        file_path = tmp_path / f"{kind}.safetensors"
        safetensors.torch.save_file(held, file_path, described)
        with pytest.raises(ValueError, match=message):
            integration.load_adapter(target, file_path)
    assert integration.list_adapters(target) == {}


def test_other_objects_and_pipelines_without_adapters_are_refused(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    with pytest.raises(ValueError, match="expected a diffusers pipeline, got UNet2DConditionModel"):
        integration.load_adapter(pipe.unet, tmp_path / "a.safetensors")
    calls = (
        lambda: integration.fuse(pipe),
        lambda: integration.unfuse(pipe),
        lambda: integration.set_scales(pipe, 1.0),
        lambda: integration.delete_adapter(pipe, "default"),
        lambda: integration.save_adapter(pipe, tmp_path / "a.safetensors"),
        lambda: integration.disabled(pipe).__enter__(),
    )
    for call in calls:
        with pytest.raises(ValueError, match="no RandLoRA adapters"):
            call()
    with pytest.raises(ValueError, match="one .safetensors file"):
        integration.save_adapter(pipe, tmp_path / "a.bin")


def test_presets_say_what_they_are_for() -> None:
    pipe = PIPELINES["sd15"]()
    with pytest.raises(ValueError, match="diffusers:text is for text encoders.*UNet2DConditionModel"):
        inject(pipe.unet, RandLoRAConfig(rank=4, target_modules="diffusers:text"))
    with pytest.raises(ValueError, match="for the denoisers.*Linear"):
        inject(torch.nn.Linear(32, 32), RandLoRAConfig(rank=4, target_modules="diffusers:backbone"))
    for model in (denoiser(pipe), *text_encoders(pipe).values()):
        with pytest.raises(ValueError, match="presets attention, backbone, conv, text"):
            inject(model, RandLoRAConfig(rank=4, target_modules="diffusers:all"))
