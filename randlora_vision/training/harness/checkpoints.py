"""Checkpoints of a run: safetensors and JSON, in one folder per step that is written atomically.

By hand, because accelerate and PyTorch pickle the state of an optimiser.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from randlora_vision.checksums import CRC32, SHA256, checksum
from randlora_vision.files.atomic import remove_folder, replacing_folder
from randlora_vision.json_values import check_object, check_type, parse_json
from randlora_vision.names import counted, listing, printable
from randlora_vision.training.harness.optimizer_state import State
from randlora_vision.training.harness.options import CheckpointOptions, RunOptions

FOLDER = "checkpoints"
_FORMAT = 3
_CHECKSUMS = {2: SHA256, _FORMAT: CRC32}  # the algorithm, which is also the key, in each format that is read
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_STEPS = "training.steps"
_IMAGES_AND_SPLIT, _IMAGES = "images and split", "images"  # hashes of their record, whole and without their place
_SHARES = ("training.batch_size", "training.gradient_accumulation_steps", "processes")
_CONTENT = {"format": int, "step": int, "settings": dict, "values": dict}

_VALUES = {
    "optimizer": dict,
    "scaler": dict | None,
    "recent": list,
    "seconds": float,
    "falls": int,
    "best": dict | None,
}
_BEST = {"step": int, "value": float, "evaluations_since": int}


@dataclass(frozen=True)
class Checkpoint:
    """A state read from disk, with the settings of the run that wrote it."""

    path: Path
    settings: dict[str, Any]
    state: State

    def check(
        self,
        settings: Mapping[str, Any],
        free: Sequence[str],
        indivisible: str = "",
        places: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Return notes on changes that change the result; raise ValueError, listing the others, for other settings.

        `free` names the settings, or groups of settings, that may differ ("run", "training.workers"). The number of
        processes, the batch size and the accumulation steps may differ if their product, the images of a step, is the
        same: the steps then consist of the same images, unless `indivisible` says why they do not. So may `places`,
        the settings that say where the images are, if the images there are the same. A setting that the version which
        wrote the checkpoint did not have counts as its default in `defaults`, and one that this version no longer has
        may have been off: None, False, 0 or empty.
        """
        then, now = _flat(self.settings), _flat(_plain(settings))
        then = {**{name: value for name, value in _flat(_plain(defaults or {})).items() if name in now}, **then}
        then = {name: value for name, value in then.items() if value or name in now}
        differing = [name for name in {**then, **now} if then.get(name) != now.get(name) and name != _IMAGES]
        notes = []
        if then.get(_IMAGES) == now.get(_IMAGES) and (moved := [name for name in places if name in differing]):
            free = [*free, *moved, _IMAGES_AND_SPLIT]
            notes.append(f"{_changes(moved, then, now)}: the same images in another place")
        shares = [name for name in _SHARES if name in differing]
        images, images_now = (math.prod(values.get(name) or 1 for name in _SHARES) for values in (then, now))
        if shares and images == images_now and not indivisible:
            free = [*free, *_SHARES]
            notes.append(
                f"{_changes(shares, then, now)}: the steps have the same images as before, but random draws in the "
                "model, such as dropout, differ"
            )
        may = {name for name in {**then, **now} if any(name == part or name.startswith(f"{part}.") for part in free)}
        refused = [name for name in differing if name not in may]
        if refused:
            hint = ""
            if shares and indivisible:
                hint = f" ({indivisible}: other batches have other images)"
            elif shares and images != images_now:
                hint = f" ({counted(images, 'image')} in a step, now {images_now})"
            allowed = ", ".join(sorted(_flag(name) for name in may if name in now))
            raise ValueError(
                f"cannot resume {self.path} with other settings: {_changes(refused, then, now)}{hint}; these may "
                f"change: {allowed}, and --batch-size, --gradient-accumulation-steps and the number of processes if a "
                "step has as many images"
            )
        steps = now.get(_STEPS)
        if steps is not None and steps < self.state.step:
            raise ValueError(f"{self.path} is after step {self.state.step}: give --steps {self.state.step} or more")
        if _STEPS in differing:
            notes.append(f"{_changes([_STEPS], then, now)}: from here on, the learning rate follows the new schedule")
        return notes


class Checkpoints:
    """Writes the checkpoints of a run at regular intervals, and removes the oldest beyond a limit.

    A process that must not write passes `writing=False`.
    """

    def __init__(
        self, run: Path, options: CheckpointOptions, settings: Mapping[str, Any], writing: bool = True
    ) -> None:
        self.folder = run / FOLDER
        self.every = options.checkpoint_every
        self.limit = options.checkpoints_total_limit
        self.settings = settings
        self.writing = writing
        for unfinished in self.folder.glob(".step-*") if writing else ():  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint must be written after this step."""
        return self.every > 0 and step % self.every == 0

    def write(self, state: State) -> None:
        """Write a checkpoint under a temporary name, rename it, and only then remove older checkpoints."""
        if not self.writing:
            return
        # A run resumed from an earlier step reaches the same one again.
        with replacing_folder(self.folder / f"step-{state.step:06}", overwrite=True) as unfinished:
            save_file(state.tensors, unfinished / _TENSORS)
            content = {
                "format": _FORMAT,
                "step": state.step,
                "settings": self.settings,
                CRC32: _checksum(unfinished / _TENSORS, CRC32),
                "values": state.values,
            }
            (unfinished / _STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self._prune(state.step)

    def _prune(self, step: int) -> None:
        """Keep the newest checkpoints up to `step`; remove later ones, which predate the resumed run."""
        found = list_checkpoints(self.folder)
        past = [path for number, path in found if number <= step]
        for path in [*past[: -self.limit], *(path for number, path in found if number > step)]:
            remove_folder(path)


def find_checkpoint(
    options: CheckpointOptions, run: RunOptions, say: Callable[[str], None] = print
) -> tuple[Checkpoint | None, RunOptions]:
    """Read the checkpoint that `--resume` names; return it, and `run` with its run folder as output folder.

    The latest is the newest whole one, or None in a folder without any, so that one command both starts and resumes
    a run; `say` receives a line about either. Raises ValueError when all are damaged, when the one that was named is
    missing or damaged, or when --output-dir is another folder.
    """
    if options.resume is None:
        return None, run
    if run.overwrite:
        raise ValueError("--overwrite would remove the run that --resume continues: give only one of the two")
    if options.resume == "latest":
        if run.output_dir is None:
            raise ValueError("--resume latest needs --output-dir, the run folder whose latest checkpoint is used")
        return _newest_whole(Path(run.output_dir) / FOLDER, say), run
    path = Path(options.resume)
    checkpoint = read_checkpoint(path)
    home = path.absolute().parent.parent
    if run.output_dir is not None and Path(run.output_dir).resolve() != home.resolve():
        raise ValueError(
            f"--resume {path} continues in {home}, but --output-dir is {run.output_dir}: omit --output-dir"
        )
    return checkpoint, replace(run, output_dir=run.output_dir or str(path.parent.parent))


def _newest_whole(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    found = list_checkpoints(folder)
    if not found:
        say(f"note: --resume latest: {folder.parent} holds no checkpoint, so the run starts anew")
        return None
    damages = []
    for _, path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            damages.append(str(error))
        else:
            for damage in damages:
                say(f"note: {damage}; an earlier one is used")
            return checkpoint
    raise ValueError(f"--resume latest: {'; '.join(damages)} (remove {folder} to start anew)")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the step and path of every checkpoint in a folder, oldest first."""
    names = ((re.fullmatch(r"step-(\d+)", path.name, re.ASCII), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in names if match)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raise ValueError when it is missing or damaged."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}")
    what = "is damaged"
    try:
        value = parse_json((path / _STATE).read_bytes(), _STATE)
        number = value.get("format") if isinstance(value, dict) else None
        algorithm = _CHECKSUMS.get(number if isinstance(number, int) else _FORMAT)
        if algorithm is None:
            what = "was written by another version of randlora_vision"
            raise ValueError(f"its format is {number}, but this version reads {' and '.join(map(str, _CHECKSUMS))}")
        content = check_object(value, {**_CONTENT, algorithm: str}, _STATE)
        if content[algorithm] != _checksum(path / _TENSORS, algorithm):
            raise ValueError(f"{_TENSORS} is not the file that was written")
        state = State(content["step"], content["values"], load_file(path / _TENSORS))
        return Checkpoint(path, content["settings"], state)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(printable(f"the checkpoint {path} {what}: {error}")) from error


def check_state(state: State, shapes: Mapping[str, Sequence[int]], averages: bool) -> dict[str, Any]:
    """Return the values of a trainer's state; raise ValueError unless it has them and the right tensors.

    `shapes` are those of what is trained, by name, and of their moving averages if there are `averages`.
    """
    where = f"the checkpoint of step {state.step}"
    values = check_object({"falls": 0, **state.values}, _VALUES, where)  # older ones do not have them
    if values["best"] is not None:
        values["best"] = check_object(values["best"], _BEST, f"{where}, best")
    sums, count = (values["recent"] + [None, None])[:2]
    check_type(sums, dict[str, float], f"{where}, recent", "[0]")
    check_type(count, int, f"{where}, recent", "[1]")
    kinds = ("parameters", "ema") if averages else ("parameters",)
    own = {f"{kind}/{name}": tuple(shape) for kind in kinds for name, shape in shapes.items()}
    saved = {name: tuple(t.shape) for name, t in state.tensors.items() if name.startswith("parameters/") or name in own}
    differing = sorted(name for name in {**own, **saved} if own.get(name) != saved.get(name))
    if differing:
        raise ValueError(
            f"{where} does not hold the parameters trained here: {len(differing)} are missing on one side, or of "
            f"another shape ({listing(differing, 3)})"
        )
    return values


def _checksum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(1 << 20), b""), algorithm)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _changes(names: Iterable[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(f"{_flag(name)} was {then.get(name)!r}, is now {now.get(name)!r}" for name in names)


def _flag(name: str) -> str:
    """Return the flag of a grouped option name; other names are returned unchanged."""
    return "--" + name.rpartition(".")[2].replace("_", "-") if "." in name else name
