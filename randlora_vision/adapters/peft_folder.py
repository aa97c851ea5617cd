"""Reading what PEFT's RandLora saves: a folder with adapter_config.json and adapter_model.safetensors.

Shapes: R rank, N bases, m narrow side. PEFT stores lambda (R, N) and gamma (N, m) per layer, its projections
A (R, 1, m) and B (M, N, R) once for the model and again for every layer, and biases and `modules_to_save` under the
names of the base model. If the projections were not saved (``save_projection=False``), they are drawn again from their
key. PEFT draws dense ones in bfloat16, or in float16 on hardware without it, and does not record which: bfloat16 is
assumed unless the caller says otherwise, and the report's `warnings` mention it. Stored projections that can be
reproduced from their key are replaced by a seed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from randlora_vision.bases.peft import draw
from randlora_vision.bases.stored import STORED, stored_bases
from randlora_vision.config import RandLoRAConfig
from randlora_vision.errors import printable_errors
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.untrusted import check_container, check_finite, read_json
from randlora_vision.injection.candidates import LINEAR, QUANTIZED, TRANSPOSED, Candidate, candidates
from randlora_vision.injection.selection import select
from randlora_vision.injection.sizing import bases_spec
from randlora_vision.injection.trained_in_full import find_saved
from randlora_vision.json_values import check_object
from randlora_vision.names import listing
from randlora_vision.report import Target

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_DENSE = {torch.bfloat16: "peft", torch.float16: "peft_float16"}
_SETTINGS = {
    "r": int,
    "randlora_alpha": float,
    "randlora_dropout": float | None,
    "projection_prng_key": int | None,
    "sparse": bool | None,
    "very_sparse": bool | None,
    "target_modules": list[str] | str | None,
    "layers_to_transform": list[int] | int | None,
    "modules_to_save": list[str] | None,
    "bias": str | None,
}
"""The settings of PEFT that are read, with their types in JSON."""


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The content of a PEFT folder, or of a live PEFT model.

    Attributes:
        source: Where it came from, for error messages.
        settings: Those of PEFT's configuration that are in `_SETTINGS`.
        trained: Module path -> (lambda (R, N), gamma (N, m)).
        saved: Path -> tensor trained in full: biases and `modules_to_save`.
        projections: A (R, m) and B (M, N * R), or None if they were not saved.
        dtype: The dtype in which dense projections were drawn if they were not saved.
    """

    source: str
    settings: Mapping[str, Any]
    trained: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor]
    projections: tuple[Tensor, Tensor] | None
    dtype: torch.dtype = torch.bfloat16

    @printable_errors
    def fit(self, model: nn.Module) -> AdapterFile:
        """Convert to this library's form of the adapter, for this base model.

        Raises:
            ValueError: If a layer is not in the model or cannot be adapted, or a setting or size is wrong.
        """
        everything = candidates(model)
        found = self._find_layers(model, everything)
        try:
            config = RandLoRAConfig(
                rank=self.settings["r"],
                alpha=self.settings["randlora_alpha"],
                dropout=self.settings["randlora_dropout"] or 0.0,
                seed=self._key % 2**64,  # torch counts negative keys from the end
            )
        except ValueError as error:
            raise ValueError(f"{self.source}: PEFT's configuration lacks a valid setting: {error}") from None
        config = self._choose(model, config, found, everything)
        targets = tuple(self._target(candidate, config, *self.trained[path]) for path, candidate in found.items())
        config = self._choose_bases(config, targets)
        stored = stored_bases(*self.projections) if config.bases == STORED and self.projections is not None else None
        spec = bases_spec(config, targets, stored)
        return AdapterFile(
            config,
            spec,
            None,
            targets,
            {candidate.name: self.trained[path] for path, candidate in found.items()},
            self.saved,
            stored,
            self._notes(config),
        )

    @property
    def _key(self) -> int:
        key: int | None = self.settings["projection_prng_key"]
        return key or 0

    def _find_layers(self, model: nn.Module, everything: list[Candidate]) -> dict[str, Candidate]:
        """PEFT's module path -> the model's own layer."""
        known = {name: c for c in everything for name in (*c.aliases, c.name)}
        missing = sorted(self.trained.keys() - known.keys())
        if missing:
            raise ValueError(
                f"{self.source} does not fit this {type(model).__name__}: it has no layer "
                f"{listing(map(repr, missing), 3)} ({len(missing)} of the file's {len(self.trained)} are missing)"
            )
        found = {}
        for path in self.trained:
            candidate = known[path]
            problem = candidate.problem
            if candidate.aliases:
                problem = f"it shares its weight with {candidate.aliases[0]!r}, and PEFT adapted only one of the two"
            if candidate.kind not in (LINEAR, TRANSPOSED, QUANTIZED):
                problem = "it is not a linear layer, and PEFT adapts only linear layers"
            if problem:
                raise ValueError(f"{self.source}: {path!r} cannot be adapted: {problem}")
            found[path] = candidate
        return found

    def _choose(
        self, model: nn.Module, config: RandLoRAConfig, found: Mapping[str, Candidate], everything: list[Candidate]
    ) -> RandLoRAConfig:
        """Choose a configuration for exactly these layers and tensors: PEFT's settings if they fit, otherwise names.

        PEFT's regular expressions are not run: one from an untrusted file could take unbounded time.
        """
        whole = list(self.settings["modules_to_save"] or [])
        if self.settings["bias"] not in (None, "none"):
            whole.append("bias")
        try:
            fits = set(find_saved(model, whole)) == set(self.saved)
        except ValueError:
            fits = False
        config = dataclasses.replace(config, modules_to_save=tuple(whole if fits else sorted(self.saved)))
        wanted = {candidate.name for candidate in found.values()}
        names, layers = self.settings["target_modules"], self.settings["layers_to_transform"]
        if isinstance(names, list) and len(names) <= len(wanted):
            try:
                tried = dataclasses.replace(config, target_modules=sorted(names), layers_to_transform=layers)
                if {candidate.name for candidate in select(model, tried, everything)[0]} == wanted:
                    return tried
            except ValueError:
                pass  # not in the model, or layers are numbered differently
        exact = "|".join(re.escape(candidate.name) for candidate in found.values())
        return dataclasses.replace(config, target_modules=f"(?:{exact})")

    def _target(self, candidate: Candidate, config: RandLoRAConfig, lam: Tensor, gamma: Tensor) -> Target:
        target = candidate.target(config.rank, config.alpha_of(candidate.paths))
        found, needed = (tuple(lam.shape), tuple(gamma.shape)), target.trained_shapes
        if found != needed:
            raise ValueError(
                f"{self.source}: lambda and gamma of {candidate.name!r} are {found[0]} and {found[1]}, but rank "
                f"{config.rank} and the model's layer need {needed[0]} and {needed[1]}"
            )
        return target

    def _choose_bases(self, config: RandLoRAConfig, targets: tuple[Target, ...]) -> RandLoRAConfig:
        """Choose the kind of bases: PEFT's generator if it reproduces the stored ones bit for bit."""
        dense = (_DENSE[self.dtype],) if self.projections is None else tuple(_DENSE.values())
        kinds = dense
        for flag in ("sparse", "very_sparse"):  # the latter wins where both are set
            if self.settings[flag]:
                kinds = (f"peft_{flag}",)
        for kind in kinds:
            drawn = dataclasses.replace(config, bases=kind)
            try:
                spec = bases_spec(drawn, targets)
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from None
            if self.projections is None:
                return drawn
            a, b = self.projections
            if (a.shape, b.shape) == ((spec.rank, spec.narrow), (spec.wide, spec.columns)):
                made = draw(kind, spec.seed, spec.rank, spec.narrow, spec.wide)
                if all(torch.equal(x, y) for x, y in zip((a, b), made, strict=True)):
                    return drawn
        return dataclasses.replace(config, bases=STORED)

    def _notes(self, config: RandLoRAConfig) -> tuple[str, ...]:
        if self.projections is not None or config.bases not in _DENSE.values():
            return ()
        other = next(str(dtype) for dtype in _DENSE if dtype != self.dtype)
        return (
            f"{self.source} holds no projections: they were drawn from projection_prng_key "
            f"{self._key} in {self.dtype}; if PEFT drew them in {other} when the "
            "adapter was trained (hardware without bfloat16), these values are wrong",
        )


@printable_errors
def read(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PeftAdapter:
    """Read a folder written by PEFT's `save_pretrained`; nothing but JSON and safetensors is opened.

    Args:
        directory: A folder with adapter_config.json and adapter_model.safetensors.
        dtype: The dtype in which to draw dense projections that were not saved: bfloat16 or float16.

    Raises:
        ValueError: If something is missing, damaged, a pickle or not finite, or the method is not RandLora.
    """
    if dtype not in _DENSE:
        raise ValueError(f"PEFT draws its projections in bfloat16 or float16, not in {dtype}")
    if not (directory / CONFIG_FILE).is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        inside += sorted(path.name for path in directory.glob("*.safetensors"))
        hint = f"; it contains: {listing(inside)}" if inside else ""
        raise ValueError(
            f"{str(directory)!r} is a folder without PEFT's {CONFIG_FILE}: give a folder that has one, or the "
            f".safetensors file of an adapter{hint}"
        )
    settings = read_json(directory / CONFIG_FILE)
    method = check_object(settings, {"peft_type": str}, directory / CONFIG_FILE)["peft_type"]
    if method != "RANDLORA":
        raise ValueError(f"{directory} holds PEFT's {method!r}, not a RandLora adapter ('RANDLORA')")
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        others = [directory / name for name in ("adapter_model.bin", "adapter_model.pt") if (directory / name).exists()]
        for other in others:
            check_container(other)
        raise ValueError(f"{directory} has no {WEIGHTS_FILE}")
    check_container(weights)
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            return from_tensors(str(directory), settings, names, file.get_tensor, dtype)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file (truncated or damaged?): {error}") from None


def from_tensors(
    source: str,
    settings: Mapping[str, Any],
    names: list[str],
    get: Callable[[str], Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> PeftAdapter:
    """Sort PEFT's tensors by kind; `get` is called once per tensor, so that a large file is not kept in memory.

    Raises:
        ValueError: If a tensor or setting is missing or is not as PEFT writes it.
    """
    settings = check_object(settings, _SETTINGS, f"{source}: {CONFIG_FILE} lacks a valid setting")
    parts: dict[str, dict[str, Tensor]] = {"randlora_lambda": {}, "randlora_gamma": {}}
    projections: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name in sorted(names):
        path, _, part = name.removeprefix(PREFIX).rpartition(".")
        if ".modules_to_save." in name or ".original_module." in name:
            continue  # with bias="all", PEFT writes these in addition to the tensor in use, and does not read them back
        tensor = get(name)
        if not part.startswith("randlora_"):
            saved[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} has dtype {tensor.dtype}, not floats")
        check_finite(source, {name: tensor})
        if part in parts:
            parts[part][path] = tensor
        elif part in ("randlora_A", "randlora_B"):
            tensor = _as_matrix(source, name, tensor)
            if not torch.equal(projections.setdefault(part, tensor), tensor):
                raise ValueError(f"{source}: {name} differs from the other layers' {part}: PEFT shares one for all")
        else:
            raise ValueError(f"{source}: unknown tensor {name!r}")
    lambdas, gammas = parts.values()
    if not lambdas or lambdas.keys() != gammas.keys() or len(projections) == 1:
        raise ValueError(f"{source} is incomplete: every adapted layer needs randlora_lambda and randlora_gamma")
    pair = (projections["randlora_A"], projections["randlora_B"]) if projections else None
    trained = {path: (lam, gammas[path]) for path, lam in lambdas.items()}
    return PeftAdapter(source, settings, trained, saved, pair, dtype)


def _as_matrix(source: str, name: str, tensor: Tensor) -> Tensor:
    """Reshape A (R, 1, m) to (R, m), and B (M, N, R) to (M, N * R), in float32."""
    if tensor.ndim != 3 or (name.endswith("A") and tensor.shape[1] != 1):
        raise ValueError(f"{source}: {name} has the shape {tuple(tensor.shape)}, not PEFT's (R, 1, m) or (M, N, R)")
    return (tensor[:, 0] if name.endswith("A") else tensor.flatten(1)).float().contiguous()
