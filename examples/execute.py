"""Run the notebooks and keep their outputs in them: python -m examples.execute (`make notebooks`)."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(notebook: NotebookNode, folder: str | os.PathLike[str], seconds: int = 600) -> None:
    """Put the outputs of a fresh kernel, which works in `folder`, into a notebook.

    Raises nbclient.exceptions.CellExecutionError if a cell fails or takes longer than `seconds`.
    """
    # Without ipywidgets, tqdm says that its bars are plain.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=seconds, resources=resources, record_timing=False).execute()


def main() -> None:
    """Write the notebooks again."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        notebook.metadata["language_info"] = {"name": "python"}  # not the version, which changes nothing
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB", file=sys.stderr)


if __name__ == "__main__":
    main()
