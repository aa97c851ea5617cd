"""The actions of the `randlora` command: one function per subcommand, which returns the exit code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import randlora_vision
from randlora_vision import RandLoRAConfig, plan
from randlora_vision.checksums import NAMES
from randlora_vision.cli.console import progress, say, show, show_json, show_table, warn
from randlora_vision.cli.models import Base, parse_base
from randlora_vision.cli.spectra import Layer, layers_of, plot_spectra
from randlora_vision.files import bundle
from randlora_vision.files.adapter_file import AdapterFile
from randlora_vision.files.claims import bases_of
from randlora_vision.names import is_preset, without_numbers

_CHECKSUMS = {f"bases_{algorithm}": name for algorithm, name in NAMES.items()}
_REPRODUCED = "as in the training"
_LORA = {"lora-diffusers": "diffusers", "lora-kohya": "kohya", "lora-peft": "peft", "lycoris": "lycoris"}
CONVERSIONS = ("randlora", "peft", *_LORA)


def info(file: str, each: bool, plot: str | None, as_json: bool) -> int:
    """Show the content of an adapter file: `each` layer by itself, or layers that differ only in numbers together."""
    path = _existing(file)
    if path.is_dir():
        raise ValueError(f"{file!r} is a folder: give a file (`randlora convert --to randlora` converts a PEFT folder)")
    parts = bundle.read(path)
    with progress("singular values") as step:
        layers = layers_of(path, parts, step)
    if plot:
        plot_spectra(layers, path.name, Path(plot))
    numbers = sum(layer.target.num_parameters for layer in layers)
    whole = {name: tuple(t.shape) for content in parts.values() for name, t in content.saved.items()}
    if as_json:
        show_json(
            {
                "file": file,
                "bytes": path.stat().st_size,
                "parameters": numbers,
                "parts": {part: _about(content) for part, content in parts.items()},
                "layers": [
                    {
                        "name": layer.target.name,
                        "shape": layer.target.shape,
                        "rank": layer.target.rank,
                        "bases": layer.target.bases,
                        "parameters": layer.target.num_parameters,
                        "norm": layer.norm,
                        "effective_rank": layer.effective_rank,
                    }
                    for layer in layers
                ],
            }
        )
        return 0
    for part, content in parts.items():
        about = _about(content)
        rows = [(key, str(value)) for key, value in about["config"].items()]
        rows += [(f"bases' {name}", about[key]) for key, name in _CHECKSUMS.items() if key in about]
        show_table(part or path.name, ("setting", "value"), rows)
    columns = ("layer", "shape", "rank", "bases", "parameters", "norm", "effective rank")
    show_table("layers", columns, [_row([layer]) for layer in layers] if each else [_row(g) for g in groups(layers)])
    if whole:
        show_table("trained in full", ("tensor", "shape"), [(name, str(shape)) for name, shape in whole.items()])
    say(f"{len(layers)} layers, {numbers:,} trained numbers, {path.stat().st_size:,} bytes")
    return 0


def groups(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers in groups that differ only in the numbers in their names."""
    found: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:
        target = layer.target
        found.setdefault((without_numbers(target.name), target.shape, target.rank, target.bases), []).append(layer)
    return list(found.values())


def _row(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """One row of the table: the range of norms and effective ranks, the sum of parameters."""
    first, count = layers[0].target, len(layers)
    name = first.name if count == 1 else f"{without_numbers(first.name)} (x{count})"
    shape = f"{first.shape[0]} x {first.shape[1]}"
    parameters = sum(layer.target.num_parameters for layer in layers)
    spans = (_span([layer.norm for layer in layers]), _span([layer.effective_rank for layer in layers]))
    return (name, shape, first.rank, first.bases, parameters, *spans)


def _span(values: Sequence[float]) -> float | str:
    low, high = min(values), max(values)
    return low if len(values) == 1 else f"{low:.4g} to {high:.4g}"


def targets(
    model: str,
    component: str | None,
    target_modules: list[str] | None,
    exclude_modules: list[str],
    rank: int,
    model_args: str | None,
    as_json: bool,
) -> int:
    """Show the layers that an injection would adapt."""
    base = parse_base(model, options=model_args)
    wanted: Any = target_modules or "all-linear"
    if isinstance(wanted, list) and len(wanted) == 1 and _is_pattern(wanted[0]):
        wanted = wanted[0]
    config = RandLoRAConfig(rank=rank, target_modules=wanted, exclude_modules=exclude_modules)
    report = plan(base.skeleton(component), config)
    show(report.to_dict(), str(report), as_json)
    return 0


def merge(base: str, adapter: str, output: str, weights: str | None, model_args: str | None, as_json: bool) -> int:
    """Write the merged model in the format of its library."""
    found = parse_base(base, weights, model_args)
    if not found.has_weights:
        raise ValueError(f"{base} would be built with random weights: give the weights of the base with --weights")
    host, reports = _adapted(found, adapter)
    from randlora_vision.integrations.export import merged as _merged

    save = _merged.save_merged_folder if found.library == "diffusers" else _merged.save_merged_file
    save(host, output)
    layers = sum(len(report.targets) for report in reports)
    about = {"output": output, "layers": layers, "library": found.library, "model": found.name}
    show(about, f"{output}: {found.library} model {found.name} with {layers} merged layers", as_json)
    return 0


def convert(
    adapter: str,
    output: str,
    to: str,
    model: str,
    rank: int | None,
    energy: float | None,
    model_args: str | None,
    as_json: bool,
) -> int:
    """Write an adapter in another format."""
    if to not in _LORA and (rank is not None or energy is not None):
        raise ValueError(f"--rank and --energy are for lora-*; {to} keeps the whole adapter")
    host, _ = _adapted(parse_base(model, options=model_args), adapter)
    if to in _LORA:
        from randlora_vision.integrations.export.lora import export_lora

        with progress("layers") as step:
            report = export_lora(host, output, rank, energy, _LORA[to], progress=step)
        show(report.to_dict(), str(report), as_json)
        return 0
    if to == "peft":
        from randlora_vision.integrations import peft

        peft.export(_one_model(host), output)
    elif isinstance(host, nn.Module):
        randlora_vision.save_adapter(host, output)
    else:
        from randlora_vision.integrations import diffusers

        diffusers.save_adapter(host, output)
    show({"output": output, "format": to}, f"{output}: {to}", as_json)
    return 0


def verify(adapter: str, model: str, model_args: str | None, as_json: bool) -> int:
    """Check a file by itself and against its base model; return 1 if a check fails."""
    path = _existing(adapter)
    base = parse_base(model, options=model_args)
    checks: list[tuple[str, bool, str]] = []
    parts: dict[str, AdapterFile] = {}
    try:
        parts = {} if path.is_dir() else bundle.read(path)
        checks.append(("file", True, "unaltered, all values finite" if parts else "a PEFT folder"))
    except ValueError as error:
        checks.append(("file", False, str(error)))
    if checks[0][1]:
        host = base.build(path)
        try:
            layers = sum(len(report.targets) for report in base.attach(host, path))
            checks.append(("bases", True, _REPRODUCED if parts else "a PEFT folder has no checksum of them"))
            checks.append(("model", True, f"{layers} layers of {base.library}:{base.name}"))
        except ValueError as error:
            checks += [_bases_check(path, parts)] if parts else []
            checks.append(("model", False, str(error)))
    passed = all(ok for _, ok, _ in checks)
    if as_json:
        listed = [{"check": name, "passed": ok, "detail": detail} for name, ok, detail in checks]
        show_json({"file": adapter, "model": model, "passed": passed, "checks": listed})
    else:
        rows = [(name, "passed" if ok else "FAILED", detail) for name, ok, detail in checks]
        show_table(adapter, ("check", "result", "detail"), rows)
    return 0 if passed else 1


def _existing(file: str) -> Path:
    if not Path(file).exists():
        raise FileNotFoundError(f"no adapter file {file!r}")
    return Path(file)


def _bases_check(path: Path, parts: Mapping[str, AdapterFile]) -> tuple[str, bool, str]:
    try:
        for content in parts.values():
            bases_of(path, content)
    except ValueError as error:
        return "bases", False, str(error)
    return "bases", True, _REPRODUCED


def _about(content: AdapterFile) -> dict[str, Any]:
    assert content.bases_checksum is not None  # every file has it
    algorithm, digits = content.bases_checksum
    return {
        "config": content.config.to_dict(),
        f"bases_{algorithm}": digits,
        "saved": {name: list(tensor.shape) for name, tensor in content.saved.items()},
    }


def _adapted(base: Base, adapter: str) -> tuple[Any, list[randlora_vision.InjectionReport]]:
    path = _existing(adapter)
    host = base.build(path)
    reports = base.attach(host, path)
    for warning in dict.fromkeys(warning for report in reports for warning in report.warnings):
        warn(warning)
    return host, reports


def _one_model(host: Any) -> nn.Module:
    """The adapted model itself, or the only adapted component of a pipeline."""
    if isinstance(host, nn.Module):
        return host
    from randlora_vision.integrations.pipelines.components import adapted

    parts = adapted(host)
    if len(parts) > 1:
        raise ValueError(f"a PEFT folder is for one model, but the adapter is for {', '.join(parts)}")
    return next(iter(parts.values()))


def _is_pattern(text: str) -> bool:
    """True if `text` is a preset or pattern, which a configuration holds as a single string, not as a list of names."""
    return text in ("all", "all-linear") or is_preset(text) or any(char in text for char in "*+?[](){}|^$\\")
