"""Output of the command: tables for people, JSON for scripts, and progress on stderr."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from randlora_vision.errors import one_line
from randlora_vision.names import printable


def show_json(value: Any) -> None:
    """Print `value` as the only JSON on stdout; non-finite numbers become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def show(value: Any, text: str, as_json: bool) -> None:
    """Print `value` as JSON, or else `text`."""
    show_json(value) if as_json else say(text)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table without markup; columns that are not text are aligned to the right."""
    table = Table(title=Text(printable(title)), title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        text = all(isinstance(row[i], str) for row in rows)
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else _number(cell) for cell in row))
    console().print(table)


def say(text: str = "") -> None:
    """Print lines without markup or wrapping."""
    text = "\n".join(map(printable, text.split("\n")))
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print one line on stderr."""
    print(f"warning: {printable(one_line(text))}", file=sys.stderr)


def console() -> Console:
    """Return a console on stdout, as wide as the terminal, or 200 columns wide in a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 200)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that updates a progress bar on stderr if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
