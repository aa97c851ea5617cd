"""Time of a training step in train_clip.py and train_classifier.py: waiting for data, computing, the rest.

python -m benchmarks.overlap --workers 1

Runs the scripts themselves on generated JPEG files, with a ViT-S/16 at 224 pixels unless another model is
named, and prints the share of a step outside the forward and backward passes: the cost of decoding, transfer,
the optimiser and bookkeeping that is not hidden behind computation.
"""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import command_line
from randlora_vision.files.atomic import write_json
from randlora_vision.training.harness import fit
from randlora_vision.training.harness.loop import Trainer

_WARM_UP = 2  # steps that are not counted, in which loader processes start and memory is allocated
_SIZE = (500, 375)  # pixels of a written image, as in ImageNet
_MODELS = {"clip": "ViT-S-16", "classifier": "vit_small_patch16_224"}
_PARTS = ("waiting for data", "forward", "backward", "optimiser")

Times = Counter[str]  # seconds per part, and for whole steps


class TimedTrainer(Trainer):
    """The training loop, with a clock around each part of a step."""

    times: Times = Counter()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times.clear()
        self.batches = _Timed(self.batches, self.times)
        forward = self.task.loss.forward
        self.task.loss.forward = self._timed("forward", forward)
        self.accelerator.backward = self._timed("backward", self.accelerator.backward)
        for name in ("step", "zero_grad"):
            setattr(self.optimizer, name, self._timed("optimiser", getattr(self.optimizer, name)))
        self.accelerator.clip_grad_norm_ = self._timed("optimiser", self.accelerator.clip_grad_norm_)

    def _optimise(self, batches: Any) -> tuple[float, float]:
        if self.step == _WARM_UP:
            self.times.clear()
        with _clock(self.times, "step"):
            return super()._optimise(batches)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _clock(self.times, part):
                return function(*args, **kwargs)

        return call


class _Timed:
    """Batches, with the time spent waiting for each."""

    def __init__(self, batches: Any, times: Times) -> None:
        self.batches = batches
        self.times = times

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            with _clock(self.times, "waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def _clock(times: Times, part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():  # kernels run asynchronously
        torch.cuda.synchronize()
    times[part] += time.perf_counter() - started  # type: ignore[assignment]  # a Counter of floats


def shares(times: Times) -> dict[str, float]:
    """Return the share of each part in the step time, and the share outside the forward and backward passes."""
    whole = times["step"]
    parts = {part: times[part] / whole for part in _PARTS}
    rest = 1 - sum(parts.values())
    return {**parts, "rest": rest, "outside forward and backward": 1 - parts["forward"] - parts["backward"]}


def write_images(folder: Path, per_class: int) -> None:
    """Write JPEG files of coloured clouds: as smooth as photographs, and as expensive to decode."""
    rng = np.random.default_rng(0)
    for number in range(4):
        (folder / f"class {number}").mkdir(parents=True)
        for index in range(per_class):
            noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            noise.resize(_SIZE, Image.Resampling.BICUBIC).save(folder / f"class {number}" / f"{index}.jpg", quality=90)


def measure(script: str, model: str, data: Path, output: Path, flags: Sequence[str]) -> dict[str, float]:
    """Run a script and return the shares."""
    from randlora_vision.train_scripts import train_classifier, train_clip

    main = {"clip": train_clip.main, "classifier": train_classifier.main}[script]
    with mock.patch.object(fit, "Trainer", TimedTrainer):
        main(["--data", str(data), "--model", model, "--output-dir", str(output), *flags])
    return shares(TimedTrainer.times)


def main() -> None:
    """Measure one or both scripts and print a table."""
    parser = command_line.parser("overlap", __doc__)
    parser.add_argument("--script", choices=[*_MODELS, "both"], default="both", help="which script")
    parser.add_argument("--model", help="model to train, or one of ViT-S size")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=8, help=f"steps after {_WARM_UP} warm-up steps")
    parser.add_argument("--json", type=Path, help="also write the shares to this file")
    options, flags = parser.parse_known_args()  # unknown arguments are passed to the script
    steps = str(options.steps + _WARM_UP)
    flags += ["--workers", str(options.workers), "--batch-size", str(options.batch_size), "--steps", steps]
    flags += ["--eval-every", steps, "--report-to", "none"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", per_class=max(8, options.batch_size))
        for script in _MODELS if options.script == "both" else [options.script]:
            model = options.model or _MODELS[script]
            results[script] = measure(script, model, Path(folder) / "images", Path(folder) / script, flags)
    for script, parts in results.items():
        print(f"\ntrain_{script}.py, {options.model or _MODELS[script]}, {options.workers} workers, per step:")
        for part, share in parts.items():
            print(f"  {part:<32}{share:7.1%}")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
