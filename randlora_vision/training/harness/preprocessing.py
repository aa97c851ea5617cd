"""How images are prepared for a model, as a run folder keeps it, and the check that it stays the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_vision.files.text import read_text
from randlora_vision.json_values import check_object, parse_json

_KINDS = {"evaluation": dict, "training": dict}


def check_preprocessing(path: Path, now: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Compare how images are prepared now ("evaluation", "training" or both) with what an earlier run kept in `path`.

    A run without the file is not compared. Raises ValueError, listing the differences and the remedy.
    """
    if not path.exists():
        return
    then = check_object(parse_json(read_text(path), path), _KINDS, path)
    differing = [
        f"{name} was {before.get(name)}, now {after.get(name)}"
        for kind, values in now.items()
        for before, after in [(then[kind], json.loads(json.dumps(values)))]
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if differing:
        raise ValueError(f"images are not prepared as in {path}: {'; '.join(differing)}; {remedy}")
