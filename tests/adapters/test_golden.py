"""Golden files of this format: every later version must read the same values from them (docs/compatibility.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from randlora_vision import load_adapter, merge, save_adapter
from randlora_vision.config import BASES_KINDS
from tests.adapter_files import opened
from tests.golden.make import FILES, FOLDERS, HERE, NEWEST, base, load, load_bundle, observed
from tests.golden.make import bundle as make_bundle

VERSIONS = (HERE, NEWEST)
NEW = [f"version_3/{name}.safetensors" for name in FILES]
ONE_MODEL = [*NEW, *(f"{name}.safetensors" for name in FILES), *FOLDERS]


def expected(name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(HERE / f"{Path(name).stem}.expected.safetensors")


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(found) >= 2
    for name, tensor in wanted.items():
        assert tensor.norm() > 0.1
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ONE_MODEL)
def test_a_golden_file_gives_the_pinned_numbers(name: str) -> None:
    compare(load(HERE / name), expected(name))


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_is_still_written_byte_for_byte(name: str, tmp_path: Path) -> None:
    """From what is read of any version."""
    for folder in VERSIONS:
        model = base()
        load_adapter(model, folder / f"{name}.safetensors")
        path = save_adapter(model, tmp_path / "again.safetensors")
        assert path.read_bytes() == (NEWEST / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_golden_bundle_gives_the_pinned_numbers(folder: Path) -> None:
    compare(load_bundle(folder / "bundle.safetensors"), expected("bundle"))


def test_a_golden_bundle_is_still_written_byte_for_byte(tmp_path: Path) -> None:
    make_bundle(path := tmp_path / "bundle.safetensors")
    assert path.read_bytes() == (NEWEST / "bundle.safetensors").read_bytes()


def test_the_versions_are_what_they_are_called() -> None:
    """A golden file of an old version is not written by accident in the new one."""
    for name in (*FILES, "bundle"):
        assert opened(NEWEST / f"{name}.safetensors")[1]["format_version"] == "3"
        assert opened(HERE / f"{name}.safetensors")[1]["format_version"] == ("2" if name == "bundle" else "1")


def test_golden_adapters_add_up_on_one_model() -> None:
    names = ("uniform", "very_sparse", "saved_modules")
    model = base()
    for name in names:
        load_adapter(model, HERE / f"{name}.safetensors", name)
    found = observed(model)
    parts = [expected(name) for name in names]
    total = {key: sum(part[key] for part in parts if key in part) for key in parts[-1]}
    assert found.keys() == total.keys()
    for key, tensor in total.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-5)
    merge(model)
    plain = base().double()
    for key, tensor in parts[0].items():
        path, _, param = key.removeprefix("update.").rpartition(".")
        merged = model.get_submodule(path).base_weight(param)
        torch.testing.assert_close(merged, plain.get_parameter(f"{path}.{param}") + total[key], rtol=1e-5, atol=1e-5)
        assert tensor.norm() > 0.1


def test_every_kind_of_bases_has_a_golden_file_and_all_are_small() -> None:
    assert all((HERE / f"{kind}.safetensors").is_file() for kind in BASES_KINDS)
    files = [path for path in HERE.rglob("*") if path.suffix in (".safetensors", ".json")]
    assert len(files) >= 2 * len(FILES) and all(path.stat().st_size < 16 * 1024 for path in files)
