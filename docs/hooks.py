"""What MkDocs needs besides its configuration: the package as it is installed, the page of messages, and the notebooks.

integrations/ and train_scripts/ are at the top of the repository and become part of the package when it is installed.
The API reference is made from the source, without importing it, so a copy stands for the installed package.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import messages  # noqa: E402
import notebooks  # noqa: E402

sys.path.pop(0)


def on_startup(**_: Any) -> None:
    """Make build/docs-source/randlora_vision, before mkdocstrings looks which of its folders exist."""
    package = ROOT / "build" / "docs-source" / "randlora_vision"
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(ROOT / "randlora_vision", package)
    for folder in ("integrations", "train_scripts"):
        shutil.copytree(ROOT / folder, package / folder)


def on_files(files: Files, config: Any) -> Files:
    """Add the page of every error message, and those of the notebooks."""
    files.append(File.generated(config, "messages.md", content=messages.page()))
    for path, content in notebooks.files():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to notebooks lead to their pages."""
    return notebooks.linked(markdown)
