"""Every error message that the code raises has a remedy in the documentation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for top in ("randlora_vision", "integrations", "train_scripts") for path in (ROOT / top).rglob("*.py")]


@pytest.fixture(scope="module")
def page(pages) -> str:
    return pages.page()


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_that_raises_has_a_remedy(pages, page: str) -> None:
    folders = {path.parent for path in SOURCES if "raise " in path.read_text(encoding="utf-8")}
    for folder in folders - {ROOT / "randlora_vision"}:
        assert pages.folder_of(folder / "x.py") != "randlora_vision", f"docs/messages.py has no remedy for {folder}"
    for title, remedy in pages.REMEDIES.values():
        assert f"## {title}\n\n{remedy}\n\n- " in page, f"{title}: a remedy without messages"


def test_the_page_lists_what_is_raised(page: str) -> None:
    assert page.count("\n- ") > 350
    assert "- `target_modules is empty: give names, a regular expression, 'all-linear' or 'all'`" in page
    assert "leaves nothing to adapt: every match was skipped" in page  # in a function that the raise statement calls
    assert "the checkpoint holds no values for them" in page


def test_messages_in_variables_and_functions_are_found(pages, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "def f(x):\n    why = f'the value {x} is too large'\n    raise ValueError(why)\n"
        "def g(x):\n    raise OSError(words(x))\n"
        "def words(x):\n    return 'there is no such thing: ' + x\n"
        "def h(x):\n    raise KeyError('first of two' if x else 'second of two')\n"
    )
    assert list(pages.messages(path)) == [
        "the value … is too large",
        "there is no such thing: …",
        "first of two",
        "second of two",
    ]


def test_the_messages_in_the_troubleshooting_tables_exist(pages) -> None:
    known = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    joined = re.sub(r'"\s*\n\s*f?"', "", known)  # strings that are continued on the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for heading in ("## A file does not load", "## The Trainer"):
        part = page[page.index(heading) :].split("\n## ")[0]
        found = re.findall(r"^\| (?:a warning that a library )?`([^`]+)`", part, re.MULTILINE)
        assert found
        for text in found:
            assert all(piece in joined for piece in text.split(" ... ")), text
