"""The selection of the weights that a configuration asks for, and the error message if there are none."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence

from torch import nn

from randlora_vision.config import RandLoRAConfig, UntrustedPattern
from randlora_vision.injection.candidates import (
    CONVOLUTION,
    LINEAR_KINDS,
    PARAMETER,
    Candidate,
    candidates,
    described,
)
from randlora_vision.injection.unused import unused_layers
from randlora_vision.names import (
    close_matches,
    is_preset,
    listing,
    matches_any,
    suffixes,
    summarise,
    with_parents,
    without_numbers,
)
from randlora_vision.report import Target

PRESET_HOSTS = ("diffusers", "open_clip", "timm", "transformers")


def select(
    model: nn.Module, config: RandLoRAConfig, everything: list[Candidate] | None = None
) -> tuple[list[Candidate], list[tuple[str, str]], list[str]]:
    """Return the candidates to adapt, (name, reason) of those left out, and warnings about unused patterns.

    Raises ValueError if nothing matches, saying what the model has, or if a pattern was read from a file.
    """
    for option in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, option), UntrustedPattern):
            raise ValueError(
                f"{option} is a regular expression from an adapter file, which is never run: give a list of names, or "
                f"str(config.{option}) if you trust its author"
            )
    everything = candidates(model) if everything is None else everything
    wanted, warnings = _wanted(model, everything, config)
    warnings += _unmatched(model, everything, config)
    unused = unused_layers(model)
    chosen, skipped = [], []
    for candidate in everything:
        reason = wanted.get(candidate.name)
        if reason is None:
            continue
        reason = reason or _left_out(candidate, config) or _unused(candidate, unused)
        if reason:
            skipped.append((candidate.name, reason))
        else:
            chosen.append(candidate)
    if not chosen:
        raise ValueError(_nothing(model, config, everything, skipped))
    return chosen, skipped, warnings


def select_listed(model: nn.Module, listed: Mapping[str, Target]) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Select exactly the targets of a file, in the model's order, or raise ValueError; and name those like them."""
    everything = candidates(model)
    chosen = [candidate for candidate in everything if candidate.name in listed]
    missing = sorted(listed.keys() - {candidate.name for candidate in chosen})
    if missing:
        raise ValueError(f"{len(missing)} of the file's targets are not in the model ({listing(missing, 3)})")
    for candidate in chosen:
        if candidate.problem:
            raise ValueError(f"{candidate.name} cannot be adapted: {candidate.problem}")
        if candidate.shape != (shape := listed[candidate.name].shape):
            raise ValueError(f"{candidate.name} is {candidate.shape} in the model and {shape} in the file")
    groups = {without_numbers(name) for name in listed}
    others = [c.name for c in everything if c.name not in listed and without_numbers(c.name) in groups]
    return chosen, [(name, "not in the file") for name in others]


def is_preset_choice(config: RandLoRAConfig) -> bool:
    """True if the targets come from a preset, which skips layers narrower than the rank.

    If the user names such layers, it is an error instead.
    """
    asked = config.target_modules
    return isinstance(asked, str) and (asked in ("all", "all-linear") or is_preset(asked))


def _wanted(model: nn.Module, everything: list[Candidate], config: RandLoRAConfig) -> tuple[dict[str, str], list[str]]:
    """Name -> "" (wanted) or the reason why a preset skips it, and warnings."""
    asked = config.target_modules
    if asked in ("all", "all-linear"):
        kinds = (*LINEAR_KINDS, CONVOLUTION) if asked == "all" else LINEAR_KINDS
        wanted = {c.name: "" for c in everything if c.kind in kinds}
        if asked == "all-linear":
            wanted.update({c.name: "classifier head" for c in everything if c.name in wanted and c.head})
        return wanted, []
    if isinstance(asked, str) and is_preset(asked):
        wanted = {name: "" for name in preset_names(model, asked)}
        return {**_skipped_by(model, asked), **wanted}, []
    if isinstance(asked, str):
        pattern = re.compile(asked)
        return {c.name: "" for c in everything if any(pattern.fullmatch(path) for path in c.paths)}, []
    hits: dict[str, list[Candidate]] = {name: [] for name in asked}
    for candidate in everything:
        for suffix in {suffix for path in candidate.paths for suffix in suffixes(path)}:
            if suffix in hits:
                hits[suffix].append(candidate)
    warnings = [f"target_modules: {_why(model, everything, name)}" for name, found in hits.items() if not found]
    return {c.name: "" for found in hits.values() for c in found}, warnings


def _unmatched(model: nn.Module, everything: list[Candidate], config: RandLoRAConfig) -> list[str]:
    """Warnings about names in the other options that match nothing."""
    excluded = config.exclude_modules
    rules: list[tuple[str, str, str | Sequence[str]]] = (
        [("exclude_modules", excluded, excluded)]
        if isinstance(excluded, str)
        else [("exclude_modules", name, (name,)) for name in excluded]
    )
    unmatched = [
        (option, name) for option, name, rule in rules if not any(_excluded(c.paths, rule) for c in everything)
    ]
    for option, names in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unmatched += [(option, name) for name in names if not any(matches_any(name, c.paths) for c in everything)]
    return [f"{option}: {_why(model, everything, name)}" for option, name in unmatched]


def _why(model: nn.Module, everything: list[Candidate], name: str) -> str:
    """Why a name selects nothing: the model has nothing of that name, or it is not a weight that can be adapted."""
    what = described(model, name)
    if what is None:
        return f"{name!r} matches nothing in the model"
    inside = [candidate.name for candidate in everything if any(f".{name}." in f".{path}." for path in candidate.paths)]
    if inside:
        return f"{name!r} {what} and contains other layers: name those instead ({listing(inside, 3)})"
    return (
        f"{name!r} {what}, which cannot be adapted; linear layers, convolutions, attention projections and other "
        "two-dimensional parameters can"
    )


def preset_names(model: nn.Module, preset: str) -> list[str]:
    """The target names that ``integration:preset`` selects; raises ValueError if there is none, or it does not fit."""
    integration, _, name = preset.partition(":")
    module_name = f"randlora_vision.integrations.{integration}"
    try:
        presets = importlib.import_module(module_name).PRESETS
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module_name:
            raise
        raise ValueError(
            f"target_modules={preset!r}: there is no integration {integration!r} with presets; there are "
            f"{', '.join(PRESET_HOSTS)}"
        ) from None
    if name not in presets:
        raise ValueError(f"target_modules={preset!r}: {integration} has the presets {', '.join(sorted(presets))}")
    return list(presets[name](model))


def _skipped_by(model: nn.Module, preset: str) -> dict[str, str]:
    """What a preset leaves out in this model, with the reason, as far as its integration says so."""
    integration, _, name = preset.partition(":")
    known = sys.modules.get(f"randlora_vision.integrations.{integration}")
    skipped = getattr(known, "SKIPPED", None)
    return skipped(model, name) if skipped else {}


def _left_out(candidate: Candidate, config: RandLoRAConfig) -> str | None:
    if _excluded(candidate.paths, config.exclude_modules):
        return "exclude_modules"
    if any(matches_any(name, with_parents(candidate.paths)) for name in config.modules_to_save):
        return "trained in full (modules_to_save)"
    layers = config.layers_to_transform
    if layers is not None and _layer_index(candidate.name) not in layers:
        return f"not in layers_to_transform={list(layers)}"
    if candidate.problem:
        return candidate.problem
    narrow = min(candidate.shape or (0, 0))
    if narrow < config.rank_of(candidate.paths) and is_preset_choice(config):
        return f"its narrow side {narrow} is below rank {config.rank_of(candidate.paths)}"
    return None


def _unused(candidate: Candidate, unused: Mapping[str, str]) -> str | None:
    return next((unused[parent] for parent in with_parents((candidate.name,)) if parent in unused), None)


def _excluded(paths: tuple[str, ...], exclude: str | Sequence[str]) -> bool:
    if isinstance(exclude, str):
        return any(re.fullmatch(exclude, path) for path in paths)
    return any(f".{name}." in f".{path}." for name in exclude for path in paths)


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _nothing(
    model: nn.Module, config: RandLoRAConfig, everything: list[Candidate], skipped: list[tuple[str, str]]
) -> str:
    asked = config.target_modules
    message = f"target_modules={asked if isinstance(asked, str) else list(asked)!r} leaves nothing to adapt"
    if skipped:
        shown = listing((f"{name}: {reason}" for name, reason in skipped), 3, "; ")
        return f"{message}: every match was skipped ({shown})"
    words = (asked,) if isinstance(asked, str) else asked
    present = [word for word in words if described(model, word)]
    if present:
        return f"{message}: {'; '.join(_why(model, everything, word) for word in present[:3])}"
    groups = summarise([candidate.name for candidate in everything if candidate.kind != PARAMETER])
    if not groups:
        return f"{message}: the model has no linear layer, attention projection or convolution"
    components = {part for group in groups for part in group.split(" ")[0].split(".")}
    if isinstance(asked, str):
        components |= {"all-linear", "all"}
    hints = (close_matches(word[-100:].rpartition(".")[2], components) for word in words)
    hint = next((f"; {hint}" for hint in hints if hint), "")
    return f"{message}{hint}; the model has: {', '.join(groups[:12])}{', ...' if len(groups) > 12 else ''}"
