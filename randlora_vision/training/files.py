"""Text and JSON files, written whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

from randlora_vision.files import replacing


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, in one piece."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def fingerprint(value: Any, length: int = 12) -> str:
    """Return a short hash of a JSON-able value: the same value gives the same name everywhere."""
    canonical = json.dumps(value, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
