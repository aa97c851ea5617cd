"""The configuration of one adapter: frozen, validated once when built, and convertible to and from JSON.

Notation used in every file that handles tensors: O out, I in, M = max(O, I) the wide side, m = min(O, I) the
narrow side, R rank of one random base, N = ceil(m / R) number of bases, T tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from randlora_vision.json_values import parse_json
from randlora_vision.names import close_matches, is_preset, matches_any

BASES_KINDS = (
    "uniform",
    "normal",
    "sparse",
    "very_sparse",
    "structured",
    "peft",
    "peft_float16",
    "peft_sparse",
    "peft_very_sparse",
    "stored",
)
COMPUTE = ("auto", "dense", "factored", "memory")
"""Which orders of products are allowed; see `randlora_vision.compute.planner`."""
INITS = ("lambda-zero", "gamma-zero")
_LARGEST_RANK = 2**63 - 1
SCALING = 20.0
"""alpha / rank when alpha is not given: the default of PEFT's RandLora (alpha 640 at rank 32)."""


class UntrustedPattern(str):
    """A pattern that was read from a file: it is kept as text and never compiled or run, which could take for ever."""


@dataclasses.dataclass(frozen=True)
class RandLoRAConfig:
    """Settings of one RandLoRA adapter (arXiv 2502.00987).

    The update of a frozen weight is ``delta W = (alpha / rank) * sum_n B_n diag(lambda_n) A diag(gamma_n)`` with
    frozen random bases A and B_n. It can reach full rank for any ``rank``.

    Attributes:
        rank: Rank R of ONE random base. Unlike LoRA's, a LARGER rank means FEWER trained numbers:
            a weight with narrow side m trains ``R * N + N * m`` of them, N = ceil(m / R), about ``m * m / R``.
        alpha: The update is scaled by ``alpha / rank``. ``None`` means ``20 * rank``.
        dropout: Probability of zeroing an input element of the adapter branch during training. It applies to
            Linear layers that are called; a weight that the model reads directly (a packed attention projection,
            a convolution kernel) has no separate adapter input, so dropout has no effect on it.
        target_modules: What to adapt. A list of names, each matching whole trailing components of a module's
            path (``"attn.qkv"`` matches ``blocks.0.attn.qkv``) or of a parameter's (``"in_proj_weight"``);
            or one string: ``"all-linear"`` (every nn.Linear and every attention projection, classifier heads
            excluded), ``"all"`` (the same plus heads and convolutions), a preset of an integration such as
            ``"open_clip:vision"``, or a regular expression that must match a whole path.
        exclude_modules: What not to adapt: a list of names (any run of whole components of a path, so that
            ``"visual"`` excludes a whole tower) or a regular expression that must match a whole path.
        layers_to_transform: Adapt only targets whose first numeric path component is one of these indices.
        rank_pattern: Rank overrides by target name; keys match as in ``target_modules``, and the first match wins.
        alpha_pattern: Alpha overrides by target name; keys match as in ``rank_pattern``.
        bases: Kind of the random bases, all of unit variance. ``"structured"``: -1/+1 from small Hadamard matrices and
            random signs; no large matrix is stored or multiplied, so a training step costs little more than LoRA's
            (see `randlora_vision.bases.hadamard`). As independent numbers, the distribution of PEFT and the paper
            (``"uniform"``), ``"normal"``, ``"sparse"`` (-1/0/+1 with probabilities 1/6, 2/3, 1/6) or
            ``"very_sparse"`` (non-zero with probability 1 / sqrt(m), m the largest narrow side); PEFT can load an
            export of these. For exchange with PEFT: ``"peft"``, ``"peft_float16"``, ``"peft_sparse"`` and
            ``"peft_very_sparse"`` are PEFT's own (`randlora_vision.bases.peft`), and ``"stored"`` means that the
            bases are in the adapter's file.
        seed: Seed of the bases, 0 <= seed < 2**64. The same seed gives the same bases on every machine.
        init: ``"lambda-zero"`` (lambda = 0, gamma = 1 / max(N, m), as in PEFT) or ``"gamma-zero"`` (gamma = 0,
            lambda = 1 / max(R, N), as in the paper's vision code; needs a smaller learning rate). Both start
            from the unchanged base model.
        modules_to_save: Modules or parameters trained in full and saved with the adapter, such as a new
            classifier head or CLIP's ``logit_scale``; names match as in ``target_modules``.
        compute: Order of the matrix products of a called Linear layer: ``"auto"`` uses the cheapest for the current
            number of tokens, ``"dense"`` always builds W + delta W, ``"factored"`` always applies the factors to the
            tokens, and ``"memory"`` uses the cheapest that keeps the fewest bytes for the backward pass (it differs in
            layers with more inputs than outputs, and with many tokens). The results are equal up to rounding. This is
            not a property of the adapter: two configurations that differ only in it compare equal, and it is not
            stored in files.

    Raises:
        ValueError: If a value is out of range or of the wrong type; the message names the field.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bases: str = "structured"
    seed: int = 0
    init: str = "lambda-zero"
    modules_to_save: Sequence[str] = ()
    compute: str = dataclasses.field(default="auto", compare=False)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name), text=name != "modules_to_save"))
        if not self.target_modules:
            raise ValueError("target_modules is empty: give names, a regular expression, 'all-linear' or 'all'")
        values: dict[str, Any] = {
            "rank": _integer("rank", self.rank, 1, _LARGEST_RANK),
            "seed": _integer("seed", self.seed, 0, 2**64 - 1),
            "alpha": None if self.alpha is None else _alpha("alpha", self.alpha),
            "dropout": _number(self.dropout),
        }
        if self.layers_to_transform is not None:
            values["layers_to_transform"] = _indices(self.layers_to_transform)
        if values["dropout"] is None or not 0 <= values["dropout"] < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        _check_choice("bases", self.bases, BASES_KINDS)
        _check_choice("init", self.init, INITS)
        _check_choice("compute", self.compute, COMPUTE)
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
                raise ValueError(f"{name} must map target names to numbers, got {value!r}")
        values["rank_pattern"] = {
            key: _integer(f"rank_pattern[{key!r}]", rank, 1, _LARGEST_RANK) for key, rank in self.rank_pattern.items()
        }
        values["alpha_pattern"] = {
            key: _alpha(f"alpha_pattern[{key!r}]", alpha) for key, alpha in self.alpha_pattern.items()
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def rank_of(self, paths: tuple[str, ...]) -> int:
        """Rank of a target that has these paths."""
        return next((rank for key, rank in self.rank_pattern.items() if matches_any(key, paths)), self.rank)

    def alpha_of(self, paths: tuple[str, ...]) -> float:
        """Alpha of a target that has these paths."""
        for key, alpha in self.alpha_pattern.items():
            if matches_any(key, paths):
                return float(alpha)
        return SCALING * self.rank_of(paths) if self.alpha is None else float(self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain JSON types, without `compute`; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        del values["compute"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RandLoRAConfig:
        """Build a configuration from the output of `to_dict`.

        Raises:
            ValueError: If a key is unknown (the message names the closest valid one) or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a RandLoRA config must be a JSON object, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                hint = close_matches(str(key), known) or f"valid keys: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r} in a RandLoRA config; {hint}")
        return cls(**values)

    def to_json(self) -> str:
        """The configuration as one JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> RandLoRAConfig:
        """Build a configuration from the output of `to_json`.

        Raises:
            ValueError: If the text is not a JSON object, or under the conditions of `from_dict`.
        """
        return cls.from_dict(parse_json(text, "a RandLoRA config"))


def is_pattern(target_modules: str) -> bool:
    """True for a regular expression, which is neither a preset nor ``"all-linear"`` or ``"all"``."""
    return target_modules not in ("all-linear", "all") and not is_preset(target_modules)


def _names(field: str, value: object, text: bool) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not text:
            raise ValueError(f"{field} must be a list of names, got the string {value!r}")
        if is_pattern(value) and not isinstance(value, UntrustedPattern):
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{field}={value!r} is not a valid regular expression: {error}") from None
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{field} must be a list of non-empty names{' or a string' if text else ''}, got {value!r}")
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _indices(value: object) -> tuple[int, ...]:
    items = (value,) if isinstance(value, numbers.Integral) else value
    if not isinstance(items, (list, tuple, range, set)) or not items:
        raise ValueError(f"layers_to_transform must be layer indices or None, got {value!r}")
    return tuple(_integer("layers_to_transform", index, 0, 2**63) for index in items)


def _integer(field: str, value: object, low: int, high: int) -> int:
    """The value as a plain int; NumPy's integers are accepted, True and 3.0 are not."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < low:
        raise ValueError(f"{field} must be an integer of at least {low}, got {value!r}")
    if int(value) > high:
        raise ValueError(f"{field} must be at most {high}, got {value!r}")
    return int(value)


def _number(value: object) -> int | float | None:
    """The value as a plain finite int or float; None if it is not one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        return number if math.isfinite(number) else None
    except OverflowError:
        return None


def _alpha(field: str, value: object) -> int | float:
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError(f"{field} must be a positive number, got {value!r}")
    return number


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = close_matches(str(value), choices)
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}{hint and f'; {hint}'}")
