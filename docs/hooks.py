"""What MkDocs needs besides its configuration: the package as it is installed, and the page of error messages.

integrations/ and train_scripts/ are at the top of the repository and become part of the package when it is installed.
The API reference is made from the source, without importing it, so a copy stands for the installed package.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Make build/docs-source/randlora_vision."""
    package = ROOT / "build" / "docs-source" / "randlora_vision"
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(ROOT / "randlora_vision", package)
    for folder in ("integrations", "train_scripts"):
        shutil.copytree(ROOT / folder, package / folder)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the page of every error message."""
    sys.path.insert(0, str(ROOT / "docs"))
    import messages

    sys.path.pop(0)
    files.append(File.generated(config, "messages.md", content=messages.page()))
    return files
