"""The allowed imports between packages, as one table that every file is checked against."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = (
    "torch_internals",
    "names",
    "json_values",
    "errors",
    "checksums",
    "skeletons",
    "config",
    "report",
    "bases",
    "compute",
    "layers",
    "files",
    "injection",
    "adapters",
)
FIELDS = "training.option_fields"
MESSAGES = ("names", "json_values", "errors", "files")  # also all that the data and the harness take of the core
COMMON = (
    "",
    "integrations",
    "errors",
    FIELDS,
    "training.methods",
    "training.data",
    "training.harness",
    "training.evaluation",
)
ALLOWED = {
    "torch_internals": (),
    "names": (),
    "json_values": ("names",),
    "errors": ("names",),
    "checksums": (),
    "skeletons": (),
    "versions": (),
    "config": ("names", "json_values"),
    "report": ("config", "names"),
    "bases": ("checksums", "torch_internals"),
    "compute": ("bases", "torch_internals"),
    "layers": ("compute", "bases", "names", "torch_internals"),
    "files": ("bases", "checksums", "config", "report", "names", "json_values", "errors"),
    "figures": ("files",),
    "injection": ("layers", "compute", "files", "bases", "config", "report", "names", "torch_internals"),
    "adapters": (
        "checksums",
        "injection",
        "layers",
        "files",
        "bases",
        "config",
        "report",
        "names",
        "json_values",
        "errors",
        "torch_internals",
    ),
    "": ("adapters", "injection", "compute", "config", "report"),
    "integrations": (
        "",
        "checksums",
        "adapters",
        "injection",
        "layers",
        "bases",
        "config",
        "report",
        "skeletons",
        *MESSAGES,
    ),
    "cli": (
        "",
        "checksums",
        "integrations",
        "bases",
        "compute",
        "report",
        "skeletons",
        "versions",
        "figures",
        *MESSAGES,
    ),
    "training": (),
    FIELDS: (),
    "training.data": (FIELDS, *MESSAGES),
    "training.harness": ("checksums", FIELDS, "training.data", "versions", *MESSAGES),
    "training.methods": (
        "",
        "integrations",
        "adapters",
        "training.harness",
        *MESSAGES,
    ),  # their options are the harness's
    "training.evaluation": (
        *("integrations", "names", "errors", "files", "versions", "figures"),
        *("training.harness", "training.data", "training.methods"),
    ),
    "training.clip": (*COMMON, "names", "files"),
    "training.classifier": (*COMMON, "names", "skeletons"),
    "training.dreambooth": (*COMMON, "adapters", "skeletons", *MESSAGES),
    "demos": ("files", *(f"training.{room}" for room in ("data", "harness", "clip", "dreambooth"))),
    "train_scripts": (
        *("", FIELDS, "integrations", "demos", "names", "json_values", "errors", "files"),
        *(
            f"training.{room}"
            for room in ("methods", "data", "harness", "evaluation", "clip", "classifier", "dreambooth")
        ),
    ),
}
"""Each part of `randlora_vision` and the parts that it may import besides itself."""
LIBRARIES = {"torch", "numpy", "safetensors"}
"""The libraries that the core may import; host libraries are imported only by the parts above it."""


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "randlora_vision":  # integrations/ and train_scripts/ are installed inside the package
        parts.insert(0, "randlora_vision")
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    module_of(path): path
    for folder in ("randlora_vision", "integrations", "train_scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def room(module: str) -> str:
    """The part of the package that contains a module: ``""`` for the top level, or for example ``training.clip``."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["training"] else 1])


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports, including imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (whole if (whole := f"{module}.{alias.name}") in FILES else module for alias in node.names)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    own = room(module)
    for name in imports(FILES[module]):
        if name.split(".")[0] == "randlora_vision":
            assert room(name) in (own, *ALLOWED[own]), f"{module} imports {name}"
        elif own in CORE:
            top = name.split(".")[0]
            assert top in LIBRARIES or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_no_file_imports_itself_through_others() -> None:
    graph = {module: {name for name in imports(path) if name in FILES} for module, path in FILES.items()}
    packages = {module for module, path in FILES.items() if path.name == "__init__.py"}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for name in graph[module] - packages:
                visit(name, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())
