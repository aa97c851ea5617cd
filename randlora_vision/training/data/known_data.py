"""Well-known data sets: their class names in words, and their prompt templates.

The facts are in `known_data.json`, with their source. Names that the data sets have themselves are only tidied.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_TIDIED: Mapping[str, tuple[str, str]] = {
    "caltech256": (r"^\d+\.|-101$", ""),  # 001.ak47, bear, airplanes-101
    "cub200": (r"^\d+\.", ""),  # 001.Black_footed_Albatross
    "mnist": (r"^(\d) - \w+$", r"\1"),  # 3 - three
    "sun397": ("/", " "),  # apartment_building/outdoor
    "ucf101": (r"(?<=[a-z])(?=[A-Z])", " "),  # ApplyEyeMakeup
}


@dataclass(frozen=True)
class KnownData:
    """A well-known data set: names by class folder or label, and templates with {} for the name."""

    title: str
    names: Mapping[str, str]
    templates: tuple[str, ...]

    def tidy(self, name: str) -> str:
        """Return a class name of the data set without its numbering and separators."""
        pattern, words = _TIDIED.get(self.title, ("_", " "))
        return re.sub(pattern, words, name)


def known_data(spec: str | None) -> KnownData | None:
    """Return the data set that a source is named after: torchvision:GTSRB, hf:ORG/eurosat@train, FOLDER/cub-200."""
    if spec is None:
        return None
    last = re.split(r"[/:]", spec.partition("@")[0].rstrip("/"))[-1]
    return _known().get(_plain(last)) or _known().get(_plain(Path(last).stem))


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@cache
def _known() -> Mapping[str, KnownData]:
    content: Any = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    found = {}
    for title, values in content["data"].items():
        known = KnownData(title, values["names"], tuple(values["templates"]))
        found.update(dict.fromkeys([title, *values.get("aliases", ())], known))
    return found
