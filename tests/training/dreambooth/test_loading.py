"""A pipeline that is neither here nor on the Hub: the line says both, whatever diffusers makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from randlora_vision.training.dreambooth.loading import family_class


@pytest.mark.parametrize("name", ["nobody/nothing", "stabilityai/stable-difusion-xl", "my-folder"])
def test_a_name_that_nobody_has(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, **_: object) -> None:
        warnings.warn("an argument is deprecated", UserWarning, stacklevel=1)
        raise OSError(f"{path} does not appear to have\na file named model_index.json.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    with pytest.raises(
        ValueError, match=f"^cannot read the pipeline {name}: there is no such folder, .* on the .* Hub"
    ):
        family_class(name)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OSError, match="does not appear to have"):  # a folder without a pipeline in it
        family_class(name)
