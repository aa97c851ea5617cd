"""The Python blocks of the README and docs/ run as printed, offline; the commands in them are accepted."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest

from randlora_vision.cli import command
from randlora_vision.cli.train import SCRIPTS
from randlora_vision.train_scripts import (
    compare,
    explain,
    run_recipes,
    train_classifier,
    train_clip,
    train_dreambooth,
)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SCRIPTS: dict[str, Any] = {
    "train_clip": train_clip,
    "train_classifier": train_classifier,
    "train_dreambooth": train_dreambooth,
}
_OPTIONS: dict[Any, tuple[Any, Any]] = {
    train_clip: (train_clip.ClipOptions, train_clip.OPEN_CLIP),
    train_classifier: (train_classifier.ClassifierOptions, train_classifier.TIMM),
    train_dreambooth: (train_dreambooth.DreamBoothOptions, train_dreambooth.DIFFUSERS),
}
# Block with this import -> the module that it needs and that is not among the test requirements.
_NEEDS = {"lightning": "lightning", "open_clip_train.main": "braceexpand"}
# The blocks ask for real models by name. Here small ones have these names: the sizes make no difference to the code.
_SMALL = {
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "width": 64, "heads": 2, "layers": 1},
}


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def sections(page: Path) -> list[str]:
    """The parts of a page that are run on their own: every block of the README, all blocks of another page."""
    found = blocks(page, "python")
    if page.name == "README.md" or page.name == "loops.md":
        return found
    return ["\n".join(found)] if found else []


SECTIONS = [(name(page), number, text) for page in PAGES for number, text in enumerate(sections(page))]


@pytest.fixture
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("ViT-B-32", "ViT-S-16-alt"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, {"embed_dim": 32, **_SMALL})


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("in_a_new_folder")
@pytest.mark.parametrize(("page", "number", "text"), SECTIONS, ids=[f"{page}-{number}" for page, number, _ in SECTIONS])
def test_python_blocks_run_as_printed(page: str, number: int, text: str) -> None:
    for wanted, module in _NEEDS.items():
        if f"import {wanted}" in text and importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}, which is not among the test requirements")
    exec(compile(text, f"{page}, block {number}", "exec"), {"__name__": "snippet"})


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's shell blocks, without comments, continued lines joined."""
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith(("#", "--")):  # "--": forms of an option
                yield line
    for text in blocks(page, "bash"):  # scripts, of which the commands that start ours are checked
        yield from re.findall(r"train_scripts/\w+\.py [^']*", text.replace("\\\n", " "))


def parse_comparison(arguments: list[str]) -> None:
    own, rest = compare._parser().parse_known_args(arguments)
    script = compare.SCRIPTS[own.script]
    compare._comparison(own, script, compare.parse(script.options, rest, "", script.flags))


OWN_PARSERS: dict[str | None, Any] = {
    "train_scripts/compare.py": parse_comparison,
    "train_scripts/run_recipes.py": lambda words: run_recipes._parser().parse_args(words),
    "train_scripts/explain.py": lambda words: explain._parser().parse_args(words),
}
COMMANDS = [(name(page), line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_accepted(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    known = {*_SCRIPTS, *(Path(path).stem for path in OWN_PARSERS)}
    script = next((word for word in words if Path(word).stem in known or word.split(".")[-1] in known), None)
    if words[:2] == ["randlora", "train"]:
        parse(SCRIPTS[words[2]], words[3:])
    elif words[0] == "randlora":
        command._parser().parse_args(words[1:])
    elif script in OWN_PARSERS:
        OWN_PARSERS[script](words[words.index(script) + 1 :])
    elif script is not None:
        parse(script.removesuffix(".py").rpartition(".")[2].rpartition("/")[2], words[words.index(script) + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert words[0] in ("pip", "python", ".venv/bin/pytest"), line


def parse(script: str, arguments: list[str]) -> None:
    """Parse the arguments of a training script; the model, the data and the folder need not exist."""
    module = _SCRIPTS[script]
    if "--config" in arguments:  # names a file that a run writes
        place = arguments.index("--config")
        arguments = arguments[:place] + arguments[place + 2 :]
    kind, flags = _OPTIONS[module]
    module.parse(kind, arguments, "", flags, module.DEFAULTS.help())


def test_every_page_is_in_the_site() -> None:
    """A page that the navigation lacks is not found by anybody."""
    text = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f": {page.relative_to(ROOT / 'docs')}" in text, f"{page.name} is not in mkdocs.yml's nav"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = ("messages.md",)  # when the site is built
            if not link.startswith("http") and link not in made:
                assert (page.parent / link).exists(), f"{name(page)}: {link}"
