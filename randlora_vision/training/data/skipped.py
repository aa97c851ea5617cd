"""What a run records about its data: what could not be used, and what was changed when it was read."""

import os
import threading
from collections import Counter
from pathlib import Path

from randlora_vision.errors import one_line
from randlora_vision.files.atomic import write_errors
from randlora_vision.files.text import as_utf8
from randlora_vision.names import printable


class SkipList:
    """The data that could not be used, in `path`, and the data that was changed, in `changed.txt` beside it.

    Both files have one line per item and reason. Loader processes append to the same files, so they list what any
    process found. With `strict`, data that cannot be used is an error instead.
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.path = path
        self.strict = strict
        self._written: dict[Path, set[str]] = {}
        self._process = 0
        self._lock = threading.Lock()

    @property
    def changed_path(self) -> Path | None:
        """The file that lists what was changed."""
        return None if self.path is None else self.path.with_name("changed.txt")

    def add(self, item: object, reason: object) -> None:
        """Record an unreadable image, or (a string) a position in a file; raise ValueError when strict."""
        if self.strict:
            what = "cannot use" if isinstance(item, str) else "cannot read the image"
            raise ValueError(f"{what} {as_utf8(item)}: {reason} (without --strict-data it is skipped)")
        self._write(self.path, item, reason, once_per_item=True)

    def change(self, item: object, rule: str) -> None:
        """Record that an item was used, but changed by a rule."""
        self._write(self.changed_path, item, rule, once_per_item=False)

    def count(self) -> int:
        """Return how many distinct items were skipped, by any process."""
        return len({line.split("\t")[0] for line in _lines(self.path)})

    def changes(self) -> dict[str, int]:
        """Return how many distinct items each rule changed, in any process."""
        return dict(sorted(Counter(line.split("\t")[1] for line in _lines(self.changed_path)).items()))

    def __str__(self) -> str:
        count, changes = self.count(), self.changes()
        words = f"; skipped {count} that cannot be used, listed in {self.path}" if count else ""
        if changes:
            rules = ", ".join(f"{number} x {rule}" for rule, number in changes.items())
            words += f"; changed: {rules} (listed in {self.changed_path})"
        return words

    def _write(self, path: Path | None, item: object, reason: object, once_per_item: bool) -> None:
        if path is None:
            return
        # An item is one field of one line, whatever its name and the reason contain.
        name, why = printable(as_utf8(item)), printable(one_line(str(reason)))
        with self._lock:
            if self._process != os.getpid():  # a new loader process: its predecessors have written too
                self._process = os.getpid()
                self._written.clear()
            if path not in self._written:
                self._written[path] = {_key(line, once_per_item) for line in _lines(path)}
            line = f"{name}\t{why}"
            if _key(line, once_per_item) not in self._written[path]:
                self._written[path].add(_key(line, once_per_item))
                with write_errors(path), path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def _key(line: str, once_per_item: bool) -> str:
    return line.split("\t")[0] if once_per_item else line


def _lines(path: Path | None) -> set[str]:
    if path is None or not path.exists():
        return set()
    return set(path.read_text(encoding="utf-8").split("\n")) - {""}
