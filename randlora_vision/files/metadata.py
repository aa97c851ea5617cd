"""The metadata of an adapter file: the strings beside its tensors (`randlora_vision.files.adapter_file` lists them).

What is read is checked by type and against itself: sizes and names that a file claims are not used before that.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_vision.bases import Bases, BasesSpec
from randlora_vision.bases.peft import PEFT_KINDS
from randlora_vision.bases.stored import STORED
from randlora_vision.checksums import CRC32, Checksum
from randlora_vision.config import SCALING, RandLoRAConfig, UntrustedPattern, is_pattern
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.report import Target, smallest_bases

FORMAT = "randlora_vision"
VERSION = 3
_TARGETS_LIMIT = 2 * 2**20  # maximum bytes of the decompressed target list: about 30,000 targets
_CONFIG_LIMIT = 2**20  # maximum characters of a configuration
_LARGEST_SIDE = 2**63 - 1
_SIZES = ("rank", "narrow", "wide", "columns")


def written(config: RandLoRAConfig, spec: BasesSpec, bases_crc32: str, targets: tuple[Target, ...]) -> dict[str, str]:
    """Return the metadata of an adapter."""
    listed = [[t.name, *t.shape, t.rank, t.alpha] for t in targets]
    packed = zlib.compress(json.dumps(listed, separators=(",", ":")).encode(), 9)
    return {
        "config": config.to_json(),
        "bases": json.dumps({**dataclasses.asdict(spec), CRC32: bases_crc32}),
        "targets": base64.b64encode(packed).decode(),
    }


def check_version(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise ValueError for the metadata of a file of another format or of a newer version."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a RandLoRA adapter file: its metadata do not have format={FORMAT!r}")
    version = metadata.get("format_version", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise ValueError(f"{path} has no valid format_version: {version[:20]!r}")
    if int(version) > VERSION:
        raise ValueError(f"{path} has format version {version}, newer than this library's {VERSION}: upgrade it")


def is_bundle(metadata: Mapping[str, str]) -> bool:
    """True for a file with the adapters of several models: it has parts, and in older versions a version of its own."""
    version = metadata["format_version"]
    return "parts" in metadata if version == str(VERSION) else version == "2"


def parsed(
    path: Path, metadata: Mapping[str, Any], algorithm: str
) -> tuple[RandLoRAConfig, BasesSpec, Checksum, tuple[Target, ...]]:
    """Return configuration, spec and checksum of the bases, and targets; raise ValueError for contradictions.

    The spec of stored bases is without their checksum.
    """
    try:
        texts = check_object(dict(metadata), dict.fromkeys(("config", "bases", "targets"), str), "metadata")
        config, targets = _config(texts["config"]), _targets(texts["targets"])
        spec, checksum = _bases(texts["bases"], algorithm)
        _check_config(config, spec, targets)
    except ValueError as error:
        raise ValueError(f"{path} has malformed metadata (config, bases or targets): {error}") from None
    return config, spec, checksum, targets


def _config(text: str) -> RandLoRAConfig:
    if len(text) > _CONFIG_LIMIT:
        raise ValueError(f"the config has {len(text):,} characters, more than {_CONFIG_LIMIT:,}")
    values = check_type(parse_json(text, "config"), dict, "config")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values.get(key), str) and is_pattern(values[key]):
            values[key] = UntrustedPattern(values[key])
    return RandLoRAConfig.from_dict(values)


def _bases(text: str, algorithm: str) -> tuple[BasesSpec, Checksum]:
    kinds = {"kind": str, "seed": int, **dict.fromkeys(_SIZES, int), algorithm: str}
    values = parse_json(text, "bases")
    found = check_object(values, kinds, "bases")
    if len(values) > len(found):
        raise ValueError(f"bases: unknown key {next(key for key in values if key not in found)!r}")
    if found["kind"] not in (*Bases.kinds, STORED):
        raise ValueError(f"bases: unknown kind {found['kind']!r}")
    if not 0 <= found["seed"] < 2**64 or not all(1 <= found[size] <= _LARGEST_SIDE for size in _SIZES):
        raise ValueError(f"bases: a size or the seed is out of range ({text})")
    digits = found.pop(algorithm)
    if algorithm == CRC32 and not re.fullmatch("[0-9a-f]{8}", digits):
        raise ValueError(f"bases: crc32 must be 8 hexadecimal digits, got {digits[:20]!r}")
    return BasesSpec(**found), Checksum(algorithm, digits)


def _targets(text: str) -> tuple[Target, ...]:
    unfold = zlib.decompressobj()
    try:
        listed = unfold.decompress(base64.b64decode(text, validate=True), _TARGETS_LIMIT)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"targets: {error}") from None
    if not unfold.eof:
        raise ValueError(f"targets: the compressed list is cut off, or longer than {_TARGETS_LIMIT:,} bytes")
    if unfold.unused_data:
        raise ValueError(f"targets: {len(unfold.unused_data):,} bytes follow the compressed list")
    targets = tuple(map(_target, check_type(parse_json(listed, "targets"), list[list], "targets")))
    if not targets:
        raise ValueError("targets: the list is empty")
    if len({target.name for target in targets}) < len(targets):
        raise ValueError("a target is listed twice")
    return targets


def _target(entry: list[Any]) -> Target:
    if len(entry) != 5:
        raise ValueError(f"targets: an entry has {len(entry)} values, not name, O, I, R and alpha")
    name, *sizes, alpha = entry
    check_type(name, str, "targets", "a name")
    for size in sizes:
        if not 1 <= check_type(size, int, f"target {name!r}", "a size or rank") <= _LARGEST_SIDE:
            raise ValueError(f"target {name!r}: a size or rank is out of range: {sizes}")
    alpha = float(check_type(alpha, float, f"target {name!r}", "alpha"))
    if not 0 < alpha < math.inf:
        raise ValueError(f"target {name!r}: alpha must be a positive number, got {alpha}")
    out_features, in_features, rank = sizes
    shape = (out_features, in_features)
    return Target(name, "", shape, rank, alpha, math.ceil(min(shape) / rank))


def _check_config(config: RandLoRAConfig, spec: BasesSpec, targets: tuple[Target, ...]) -> None:
    """The targets say which rank and alpha a weight has, but only such as the configuration gives."""
    if config.bases != spec.kind or (spec.kind != STORED and config.seed != spec.seed):
        raise ValueError(
            f"the config has bases of kind {config.bases!r} and seed {config.seed}, but the file's are of kind "
            f"{spec.kind!r} and seed {spec.seed}"
        )
    ranks = {config.rank, *config.rank_pattern.values()}
    alphas = {*map(float, config.alpha_pattern.values())}
    alphas |= {SCALING * rank for rank in ranks} if config.alpha is None else {float(config.alpha)}
    for target in targets:
        if target.rank not in ranks or target.alpha not in alphas:
            raise ValueError(
                f"target {target.name!r} has rank {target.rank} and alpha {target.alpha:g}, which the config does not "
                "give to any weight"
            )


def check_sizes(path: Path, spec: BasesSpec, targets: tuple[Target, ...]) -> None:
    """Raise ValueError unless the bases are of the sizes that the targets need, or given in the file and not smaller.

    PEFT's bases may have a larger narrow side, which depends on the kinds of the layers.
    """
    needed = smallest_bases(targets)
    have = {side: getattr(spec, side) for side in needed}
    if spec.kind == STORED:
        fits = all(have[side] >= size for side, size in needed.items())
    elif spec.kind in PEFT_KINDS:
        fits = needed["narrow"] <= spec.narrow <= spec.wide
        needed |= {"narrow": spec.narrow, "columns": spec.rank * math.ceil(spec.narrow / spec.rank)}
        fits = fits and have == needed
    else:
        fits = have == needed
    if not fits:
        raise ValueError(f"{path}: its bases are {have}, but its targets need {needed}")
