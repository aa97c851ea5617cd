"""Figures in the project's one style, written atomically."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from randlora_vision.files.atomic import replacing

STYLE = Path(__file__).with_name("style.mplstyle")


def plain(text: str) -> str:
    """Return a text from outside for matplotlib, to which two dollar signs would be a formula."""
    return text.replace("$", r"\$")


@contextmanager
def figure_file(path: Path, size: tuple[float, float], title: str, **options: Any) -> Iterator[Any]:
    """Yield a new `matplotlib.figure.Figure` of `size` inches; write it to `path` with its title at the end.

    Nothing is written if the drawing raises. `options` are those of `Figure`. Needs matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=size, **options)
        yield figure
        figure.suptitle(plain(title))
        with replacing(path) as temporary:
            figure.savefig(temporary)
