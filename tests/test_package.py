"""The wheel holds what users import, and nothing under a name that is not ours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE_IMPORTS = {"torch", "numpy", "safetensors", "randlora_vision"}


@pytest.mark.slow
def test_wheel_in_a_clean_target(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert not (target / "integrations").exists()
    assert (target / "randlora_vision" / "py.typed").is_file()
    tops = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"randlora_vision", "bin"}
    assert [path.name for path in (target / "bin").iterdir()] == ["randlora"]
    script = (
        "import randlora_vision, randlora_vision.integrations.open_clip, randlora_vision.training\n"
        "print(randlora_vision.__file__)\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('integrations') is None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip().startswith(str(target))


@pytest.mark.parametrize("path", sorted((ROOT / "randlora_vision").glob("*.py")), ids=lambda path: path.name)
def test_the_core_imports_torch_numpy_and_safetensors_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            assert top in CORE_IMPORTS or top in sys.stdlib_module_names, f"{path.name} imports {name}"
            assert not name.startswith(("randlora_vision.training", "randlora_vision.integrations")), path.name


def test_the_public_surface_is_listed() -> None:
    import randlora_vision

    assert all(hasattr(randlora_vision, name) for name in randlora_vision.__all__)
    assert all(getattr(randlora_vision, name).__doc__ for name in randlora_vision.__all__)
