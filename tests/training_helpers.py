"""What the training tests need on disk and in memory: class folders of real digits, and a tiny CLIP."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from randlora_vision.integrations._open_clip_models import LoadedClip, load_clip
from randlora_vision.training.clip.defaults import resolve
from randlora_vision.training.clip.options import ClipModel, ClipOptions, ClipSettings
from randlora_vision.training.data.labelled import Batch, LabelledImages
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.option_fields import without

TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
WORDS = 512 + 8000  # bytes, and what merges make of them
NO_SKIPS = SkipList()
SCRIPTS = Path(__file__).parents[1] / "train_scripts"
QUICK = ("--steps", "3", "--batch-size", "8", "--eval-every", "2", "--log-every", "1", "--workers", "0")


class Killed(Exception):
    """Ends a run as a kill does: nothing handles it."""


def write_class_folders(root: Path, per_class: int = 6, classes: Sequence[int] = (0, 1, 2)) -> Path:
    """Write `root/<class name>/<number>.png`, real digits."""
    splits = digits.read_digits(classes)
    for label, name in enumerate(splits.class_names):
        (root / name).mkdir(parents=True)
        chosen = [i for i, other in enumerate(splits.labels["train"]) if other == label][:per_class]
        for number, index in enumerate(chosen):
            splits.images["train"][index].save(root / name / f"{number:03}.png")
    return root


def write_tiny_clip(folder: Path, config: dict[str, Any] = TINY_CONFIG) -> Path:
    """Write a random tiny CLIP as a folder for open_clip's `local-dir:`, and its parts for --model/--pretrained.

    Its vocabulary is the first sixth of CLIP's: drawing and reading the rest takes a tenth of the time of a short run.
    """
    folder.mkdir(parents=True)
    (folder / "merges.txt.gz").write_bytes(_merges())
    save_file(_tiny_weights(json.dumps(config)), folder / "open_clip_model.safetensors")
    own = {"vocab_size": WORDS + 2, "tokenizer_kwargs": {"bpe_path": str(folder / "merges.txt.gz")}}
    config = {**config, "text_cfg": {**config["text_cfg"], **own}}
    settings = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bilinear"}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _merges() -> bytes:
    """A header and the first merges of CLIP's vocabulary, which make whole words of the most frequent ones."""
    lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).splitlines(keepends=True)
    return gzip.compress(b"".join(lines[: 1 + WORDS - 512]).rstrip())


@functools.cache
def _tiny_weights(config: str) -> dict[str, torch.Tensor]:
    """The state dict of a tiny CLIP without the words that are left out; start and end of a text are the last ones."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = open_clip.CLIP(**json.loads(config)).state_dict()
    words = state["token_embedding.weight"]
    return {**state, "token_embedding.weight": torch.cat([words[:WORDS], words[-2:]])}


def tiny_clip(folder: Path) -> LoadedClip:
    """Load a tiny CLIP, written to `folder` at the first call."""
    if not folder.exists():
        write_tiny_clip(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "SimpleTokenizer", _tokenizer)
        return load_clip(f"local-dir:{folder}", None, seed=0)


def clip_settings(options: ClipOptions, model: nn.Module | None = None, captions: bool = False) -> ClipSettings:
    """Fill in the defaults, for a budget those of `model`, under the name of a tiny CLIP if none is chosen."""
    chosen = ClipModel(**without(options.clip, "model"), model=options.clip.model or "tiny")
    return resolve(options, chosen, model or nn.Identity(), captions, _no_features)


def _no_features(templates: Sequence[str]) -> Any:
    """For options with a rate, or with the embedded digits, which have a table of rates."""
    raise AssertionError("a rate is suggested")


def write_tiny_vit(folder: Path, classes: int) -> Path:
    """Write a random tiny ViT as a folder for timm's `local-dir:`."""
    import timm

    architecture = "vit_tiny_patch16_224"
    arguments: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=classes, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {
        "input_size": [3, 16, 16],
        "fixed_input_size": True,
        "num_classes": classes,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def script(name: str) -> ModuleType:
    """Import a training script from its file, as if it were run."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_in_a_new_process() -> None:
    """Forget accelerate's state, which scripts leave behind."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def run_script(name: str, argv: Sequence[str], defaults: Mapping[str, str]) -> None:
    """Run a script as in a separate process, with `defaults` for the options that are not in `argv`."""
    as_in_a_new_process()
    given = [word for option, value in defaults.items() if option not in argv for word in (option, value)]
    script(name).main([*given, *QUICK, *argv])


def read_once(data: LabelledImages, batch_size: int, steps: int, seed: int, workers: int) -> Iterator[Batch]:
    """Draw random batches as training_batches does, but read and rotate every image only once.

    Given to demos.pretraining, it halves the time of a base; what is under test starts after it.
    """
    whole = data.collate([data[index] for index in range(len(data))])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(data), generator=generator)[:batch_size]
        yield {name: values[chosen] for name, values in whole.items()}


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few pixels for every figure, which differ with what it would show: drawing takes half of a short run.

    The figures themselves are tested in tests/training/evaluation; runs in a separate process draw.
    """
    for module in [module for name, module in sys.modules.items() if name.startswith("randlora_vision.")]:
        for name, function in list(vars(module).items()):
            if name.startswith("plot_") and "path" in signature(function).parameters:
                monkeypatch.setattr(module, name, functools.partial(_write_digest, function))
    monkeypatch.setattr(open_clip.factory, "SimpleTokenizer", _tokenizer)


def _write_digest(plot: Callable[..., None], *args: Any, **options: Any) -> None:
    plot = plot.args[0] if isinstance(plot, functools.partial) else plot
    given = signature(plot).bind(*args, **options).arguments
    path = given.pop("path")
    Image.frombytes("RGB", (10, 1), hashlib.sha256(_contents(given)).digest()[:30]).save(path, "PNG")


def _contents(shown: Any) -> bytes:
    if isinstance(shown, Image.Image):
        return shown.tobytes()
    if is_dataclass(shown):
        shown = vars(shown)
    if isinstance(shown, Mapping):
        shown = list(shown.items())
    return b"".join(map(_contents, shown)) if isinstance(shown, list | tuple) else repr(shown).encode()


@functools.cache
def _tokenizer(**options: Any) -> Any:
    """Read the vocabulary once: it takes as long as a short run's training."""
    return open_clip.SimpleTokenizer(**options)


def card_scope(folder: Path) -> dict[str, Any]:
    """Execute the code of a run's model card, as a user copies it; return what it has defined."""
    scope: dict[str, Any] = {}
    exec((folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0], scope)
    return scope


def printed_code(printed: str) -> str:
    """Return the code that a script prints at its end, as a user copies it."""
    return textwrap.dedent(printed.partition("To use it:\n")[2].partition("\n\n")[0])
