"""Options from a YAML file, grouped as in a run folder's config.yaml, converted to command-line flags.

By hand, because tyro's own YAML is another language (Python types as tags), and says neither which group an option
belongs to nor in which file a mistake is.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from randlora_vision.files.text import read_text
from randlora_vision.names import close_matches


@dataclass(frozen=True)
class ConfigFile:
    """Options from a file."""

    config: str | None = None
    """A YAML file with any of these options, grouped as in a run folder's config.yaml (training: lr: 0.001); or a flat
    list of flags (lr: 0.001), as timm's args.yaml.
    Flags override the file; options in neither have their defaults. The config.yaml of a run repeats that run
    with another --output-dir; it also holds the resolved defaults, such as --lr."""


def config_words(argv: Sequence[str], options: type, foreign: Collection[str] = ()) -> list[str]:
    """Return the options of the `--config` file that `argv` names, as flags; none if it names no file.

    `options` is a dataclass of option groups. `foreign` are flags of other scripts, which any group may contain; one
    without a value is ignored. Raises ValueError for a file that cannot be read, and for an unknown group, an unknown
    option or a value of the wrong kind.
    """
    path: str | None = None
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            path = argv[place + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return _read(Path(path), options, foreign) if path is not None else []


def _read(path: Path, options: type, foreign: Collection[str]) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    try:
        return flags_of(content or {}, options, foreign)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def flags_of(content: Any, options: type, foreign: Collection[str] = ()) -> list[str]:
    """Return options as flags; raise ValueError for an unknown group or option, or a value of a wrong kind.

    They are grouped, or a flat list in the names of flags, such as the args.yaml of a run of timm.
    """
    groups = {name: get_type_hints(group) for name, group in get_type_hints(options).items()}
    homes = {name: group for group, names in groups.items() for name in names}
    if not isinstance(content, Mapping):
        raise ValueError(f"expected groups of options ({', '.join(groups)}), found {content!r}")
    if _is_flat(content, groups, {*homes, *(flag[2:].replace("-", "_") for flag in foreign)}):
        return [word for name, value in content.items() for word in _flat(name, value, homes, foreign)]
    flags: list[str] = []
    for group, values in content.items():
        if group not in groups:
            hint = f"it belongs under {homes[group]}:" if group in homes else _close(group, groups)
            raise ValueError(f"there is no group of options {group!r}; {hint}")
        if not isinstance(values, Mapping):
            raise ValueError(f"{group}: expected options ({', '.join(groups[group])}), found {values!r}")
        for name, value in values.items():
            if name not in homes and f"--{name}".replace("_", "-") in foreign:
                flags += _flag(name, value or None, isinstance(value, bool))
            elif name not in groups[group]:
                hint = f"{name} belongs under {homes[name]}:" if name in homes else _close(name, groups[group])
                raise ValueError(f"there is no option {group}: {name}; {hint}")
            else:
                flags += _flag(name, value, groups[group][name] is bool)
    return flags


def _is_flat(content: Mapping[str, Any], groups: Collection[str], known: Collection[str]) -> bool:
    return all(
        (name in known or name not in groups) and (not isinstance(value, Mapping) or str(name).endswith("_kwargs"))
        for name, value in content.items()
    )


def _flat(name: str, value: Any, homes: Mapping[str, str], foreign: Collection[str]) -> list[str]:
    """Return the words of a flag; none for one that is not set, which argparse writes as null, false or nothing."""
    flag = f"--{name}".replace("_", "-")
    if name not in homes and flag not in foreign:
        known = [*homes, *homes.values(), *(other[2:].replace("-", "_") for other in foreign)]
        raise ValueError(f"there is no option {name!r}; {_close(name, known)}")
    if not value and not isinstance(value, int | float) or value is False and name not in homes:
        return []
    if isinstance(value, Mapping):
        value = [f"{key}={part}" for key, part in value.items()]
    return _flag(name, value, isinstance(value, bool))


def _close(word: object, known: Collection[str]) -> str:
    return close_matches(str(word), known) or f"choose from {', '.join(known)}"


def _flag(name: str, value: Any, switch: bool) -> list[str]:
    """Return the command-line words that set an option; none where the value means that it is not set."""
    flag = name.replace("_", "-")
    if value is None or value == []:
        return []
    if switch != isinstance(value, bool) or isinstance(value, Mapping):
        raise ValueError(f"{name} cannot be {value!r}")
    if switch:
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]
