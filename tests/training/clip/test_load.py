from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from randlora_vision.training.clip.load import load_classifier, load_trained
from randlora_vision.training.clip.methods import adapt
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, ClipSettings, ModelOptions
from tests.training_helpers import clip_settings, tiny_clip, write_tiny_clip

NAMES = ["zero", "one", "two"]
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WEIGHTS = [
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.transformer.resblocks.1.mlp.c_fc.weight",
    "transformer.resblocks.1.mlp.c_proj.weight",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


def options_of(method: Any) -> ClipSettings:
    return clip_settings(
        ClipOptions(clip=ModelOptions(model="tiny"), adapter=ClipAdapterOptions(method=method, rank=4))
    )


def trained(folder: Path, method: Any, path: Path) -> Tensor | None:
    """Write a file of a method with perturbed weights; return the class features of a probe."""
    clip = tiny_clip(folder)
    _, adaptation = adapt(clip, NAMES, options_of(method))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adaptation.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adaptation.save(path)
    return next(adaptation.parameters())[1].detach() if method == "linear-probe" else None


def weights(folder: Path, path: Path | None, scale: float = 1.0) -> dict[str, Tensor]:
    """Return the weights that a model uses, in float64."""
    model: Any = tiny_clip(folder).model
    if path is not None:
        assert load_trained(model, path, scale) is None
    assert not any(p.requires_grad for p in model.parameters())
    modules = ((name.rpartition("."), name) for name in WEIGHTS)
    return {name: getattr(model.get_submodule(at), what).detach().double() for (at, _, what), name in modules}


@pytest.mark.parametrize("method", ["randlora", "lora", "full"])
def test_scales_lie_on_the_line_from_base_to_adapted(folder: Path, tmp_path: Path, method: str) -> None:
    path = tmp_path / "adapter.safetensors"
    trained(folder, method, path)
    base, adapted = weights(folder, None), weights(folder, path)
    assert all((adapted[name] - base[name]).norm() > 0.01 * base[name].norm() for name in WEIGHTS)
    for scale in (0.0, 0.25, 0.5, 1.0, 1.5):
        at = weights(folder, path, scale)
        for name in WEIGHTS:
            expected = base[name] + scale * (adapted[name] - base[name])
            torch.testing.assert_close(at[name], expected, rtol=0, atol=1e-6 * float(adapted[name].abs().max()) + 1e-7)
    at_zero = weights(folder, path, 0.0)
    assert all(torch.equal(at_zero[name], base[name]) for name in WEIGHTS)


def test_a_probe_is_a_part_of_the_way_from_the_prompts(folder: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "adapter.safetensors", options_of("linear-probe")
    features = trained(folder, "linear-probe", path)
    assert features is not None
    prompts = adapt(tiny_clip(folder), NAMES, options_of("linear-probe"))[0].class_features  # type: ignore[union-attr]
    assert prompts is not None
    for scale in (0.0, 0.25, 1.0):
        classifier = load_classifier(tiny_clip(folder), NAMES, options, path, scale)
        assert classifier is not None and classifier.class_features is not None
        torch.testing.assert_close(classifier.class_features, prompts + scale * (features - prompts))


def test_data_with_captions_has_no_classifier(folder: Path, tmp_path: Path) -> None:
    trained(folder, "randlora", tmp_path / "adapter.safetensors")
    assert load_classifier(tiny_clip(folder), None, options_of("randlora"), tmp_path / "adapter.safetensors") is None


def write(path: Path, kind: str) -> Path:
    content = {
        "other model": {"encoder.weight": torch.zeros(2)},
        "other shape": {"visual.proj": torch.zeros(2, 2)},
        "other classes": {"class_features": torch.zeros(7, 16)},
        "probe": {"class_features": torch.zeros(3, 16)},
    }
    if kind == "no safetensors":
        path.write_bytes(b"no tensors")
    elif kind != "missing":
        save_file(content[kind], path)
    return path


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("missing", NAMES, "adapter.safetensors"),
        ("no safetensors", NAMES, "adapter.safetensors is not an adapter file"),
        ("other model", NAMES, "is not an adapter of this model: CLIP has no parameter encoder.weight"),
        ("other shape", NAMES, r"visual.proj is \(2, 2\) in the file and \(32, 16\) in the model"),
        ("other classes", NAMES, "is a linear classifier of shape 7 x 16, but the model and the data need 3 x 16"),
        ("probe", None, "is a linear classifier, but the data has captions"),
    ],
)
def test_files_that_do_not_fit(folder: Path, tmp_path: Path, kind: str, names: Any, expected: str) -> None:
    path = write(tmp_path / "adapter.safetensors", kind)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        load_classifier(tiny_clip(folder), names, options_of("randlora"), path)
