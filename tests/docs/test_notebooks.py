"""The notebooks in examples/ run from top to bottom, and their committed outputs are those of their code."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from randlora_vision.demos import classifier, clip
from randlora_vision.training.dreambooth import task as dreambooth_task

nbformat = pytest.importorskip("nbformat")  # with nbclient, in environments of `make test`
from examples.execute import NOTEBOOKS, execute  # noqa: E402

NotebookNode = nbformat.NotebookNode
_PLACES = re.compile(r"/(?:home|root|tmp|usr|work|Users|opt|var)/|site-packages|ipykernel")
# Training is cut short; what a cell prints and draws does not depend on it.
_SHORTER = {
    "photographs": {"range(4)": "range(1)", "total_steps=4 *": "total_steps=1 *", "[:1000]": "[:100]"},
    "clip": {
        "relative_step=0.055), 140": "relative_step=0.055), 3",
        "[:1000]": "[:100]",
        "scales = [0, 0.2, 0.4, 0.6, 0.8, 1]": "scales = [0, 1]",
    },
    "subject": {
        '"240"': '"1"',
        'PROMPT = "a sks face"': f'PROMPT = "a sks face"\n{dreambooth_task.__name__}._MEASURED = 2',
        "import demo_pipeline_folder": f"import demo_pipeline_folder\nimport {dreambooth_task.__name__}",
        '"--num-class-images", "45"': '"--num-class-images", "9"',
        '"--num-inference-steps", "12"': '"--num-inference-steps", "1"',
        "num_inference_steps=12": "num_inference_steps=1",
        "scales = [0, 0.5, 0.75, 1, 1.25]": "scales = [0, 1]",
    },
}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: NotebookNode) -> list[str]:
    """What a cell prints or returns as text; that of pictures is left out."""
    found = [output.get("text") or output.data["text/plain"] for output in cell.outputs if not picture_of(output)]
    return ["".join(found)] if found else []


def picture_of(output: NotebookNode) -> str | None:
    return output.get("data", {}).get("image/png")


def outline(notebook: NotebookNode) -> list[tuple[list[str], int]]:
    """For every cell its text, without numbers, and how many pictures it draws."""
    found = []
    for cell in code_cells(notebook):
        words = [re.sub(r"[-\d][-\d.,e%() ]*", "#", text) for text in texts(cell)]
        found.append((words, sum(picture_of(output) is not None for output in cell.outputs)))
    return found


@each
def test_committed_outputs_read_on_a_forge(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run: make notebooks"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [text for cell in cells for text in texts(cell) if _PLACES.search(text) or "Warning" in text]
    pictures = [base64.b64decode(data) for data in map(picture_of, outputs) if data]
    assert len(pictures) >= 2 and all(data.startswith(b"\x89PNG") for data in pictures)
    assert path.stat().st_size < 300_000


def test_the_readme_of_the_examples_lists_them() -> None:
    text = (NOTEBOOKS[0].parent / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3 and all(f"({path.name})" in text for path in NOTEBOOKS)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the embedded models, for which nobody has to wait: they have not been trained."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in (classifier, clip):
            patch.setattr(module, "teach", lambda *arguments, **options: None)
        clip.demo_model_folder(str(cache))
        classifier.demo_model_folder(str(cache))
        patch.setenv("RANDLORA_CACHE", str(cache))
        patch.setenv("PYTHONWARNINGS", "")  # set by `execute`
        yield cache


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("untrained")
def test_notebooks_run(tmp_path: Path) -> None:
    """One after another in one kernel, each without the names of the last: importing the libraries takes seconds."""
    notebooks = {path: shorter(path) for path in NOTEBOOKS}
    committed = {path: outline(notebook) for path, notebook in notebooks.items()}
    together = nbformat.v4.new_notebook()
    for path, notebook in notebooks.items():
        (tmp_path / path.stem).mkdir()
        anew = f"%reset -f\nimport os\n\nos.chdir({str(tmp_path / path.stem)!r})"
        together.cells += [nbformat.v4.new_code_cell(anew), *notebook.cells]
    execute(together, tmp_path)
    for path, notebook in notebooks.items():
        assert outline(notebook) == committed[path], f"{path.name}: run make notebooks"


def shorter(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    source = "\0".join(cell.source for cell in notebook.cells)
    for long, short in _SHORTER[path.stem].items():
        assert long in source, f"{long} is not in {path.name}"
        source = source.replace(long, short)
    for cell, text in zip(notebook.cells, source.split("\0"), strict=True):
        cell.source = text
    return notebook
