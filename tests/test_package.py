"""The wheel holds what users import, and nothing under a name that is not ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import randlora_vision
from tests.training_helpers import write_class_folders, write_tiny_clip

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the repository, as a leftover build folder could add files of an older tree."""
    folder = tmp_path_factory.mktemp("wheel")
    not_ours = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=not_ours)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # what pip calls
    subprocess.run([sys.executable, "-c", build, folder], check=True, capture_output=True, cwd=folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A clean folder with only what pip takes from the wheel; Python finds the libraries of this environment after it.

    pip also writes the commands; the test calls what their entry points name.
    """
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_installed(site: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder with the installed wheel before everything else; it must exit with `code`."""
    folder = site.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_wheel_in_a_clean_target(wheel: Path, site: Path, tmp_path: Path) -> None:
    """One test, because test workers do not share a wheel, which takes seconds to build."""
    check_contents(site)
    check_imports_and_scripts(site, tmp_path)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True)


def check_contents(site: Path) -> None:
    assert not (site / "integrations").exists() and not (site / "train_scripts").exists()
    assert (site / "randlora_vision" / "py.typed").is_file()
    shipped = {path.relative_to(ROOT) for path in (ROOT / "randlora_vision/demos/noto").rglob("*") if path.is_file()}
    assert len(shipped) > 20 and all((site / path).is_file() for path in shipped)
    configs = {path.name for path in (ROOT / "train_scripts" / "accelerate_configs").iterdir()}
    assert configs <= set(os.listdir(site / "randlora_vision" / "train_scripts" / "accelerate_configs"))
    tops = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"randlora_vision"}
    ours = {path.relative_to(ROOT / "randlora_vision") for path in (ROOT / "randlora_vision").rglob("*.py")}
    for folder in ("integrations", "train_scripts"):
        ours |= {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    assert ours == {path.relative_to(site / "randlora_vision") for path in (site / "randlora_vision").rglob("*.py")}


def check_imports_and_scripts(site: Path, tmp_path: Path) -> None:
    """What is imported, printed, launched and refused, in one process, which takes seconds to start."""
    model, images = write_tiny_clip(tmp_path / "tiny"), write_class_folders(tmp_path / "images")
    launch = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "-m", "randlora_vision.train_scripts.train_clip"]
    arguments = ["--model", f"local-dir:{model}", "--data", images, "--output-dir", tmp_path / "run", "--rank", "4"]
    arguments += ["--steps", "2", "--batch-size", "8", "--report-to", "none"]
    done = run_installed(site, "-c", IMPORTS, *launch, *arguments, code=2)
    place, *lines = done.stdout.splitlines()
    assert place.startswith(str(site))
    printed = dict(line.split() for line in lines[: lines.index("helps")])
    assert printed["randlora_vision"] == randlora_vision.__version__
    assert printed["torch"] == metadata.version("torch") and printed["timm"] == metadata.version("timm")
    assert "--output-dir" in done.stdout.partition("helps")[2]
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: open_clip has no model")
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert Path(environment["command"][0]) == site / "randlora_vision" / "train_scripts" / "train_clip.py"


IMPORTS = """
import contextlib, importlib, importlib.util, io, os, runpy, sys, types
from importlib import metadata
words = sys.argv[1:]
import randlora_vision
assert "torch._dynamo" not in sys.modules, "importing the package imports the compiler: seconds"
import randlora_vision.integrations.open_clip, randlora_vision.training
print(randlora_vision.__file__)
assert importlib.util.find_spec("integrations") is None
sys.argv = ["randlora", "--version"]
(command,) = metadata.distribution("randlora_vision").entry_points
assert (command.group, command.name) == ("console_scripts", "randlora")
with contextlib.suppress(SystemExit):
    command.load()()
from accelerate.commands import launch

class Here:  # what accelerate launches, in this process
    returncode = 0
    def __init__(self, command, env):
        assert command[1] == "-m", command
        os.environ.update(env)
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    def wait(self): pass

launch.subprocess = types.SimpleNamespace(Popen=Here)
print("helps")
with contextlib.redirect_stderr(io.StringIO()):
    launch.launch_command(launch.launch_command_parser().parse_args(words))
scripts = ["explain", "run_recipes", "train_classifier", "train_dreambooth", "compare"]
for name in scripts:
    script = importlib.import_module(f"randlora_vision.train_scripts.{name}")
with contextlib.suppress(SystemExit):
    script.main(["--help"])
importlib.import_module("randlora_vision.train_scripts.train_clip").main(["--model", "ViT-B-33"])
"""


def test_the_public_surface_is_listed() -> None:
    assert all(hasattr(randlora_vision, name) for name in randlora_vision.__all__)
    assert all(getattr(randlora_vision, name).__doc__ for name in randlora_vision.__all__)
