"""Seeded mutants of an adapter file and of a PEFT folder: the same numbers or one short error, quickly.

The mutants are well-formed files with a matching digest, as an attacker writes them; damage that the digest notices is
in `test_hostile_files.py`.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, save_adapter
from randlora_vision.adapters.arithmetic import weighted_sum_files
from randlora_vision.cli.spectra import layers_of
from randlora_vision.files import bundle
from randlora_vision.integrations.timm import num_classes
from tests.adapter_files import edit, opened, rewritten, seal
from tests.helpers import mlp, randomize, snapshot

X = torch.linspace(-2, 2, 24).reshape(3, 8)
SECONDS = 5.0
"""Of this process, for one mutant; they take a few milliseconds each."""
MEMORY = 300 * 2**10
"""By which the process may grow in KiB."""
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3.5,
    2.0,
    10**6,
    10**12,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "8",
    "0",
    "all",
    "timm:backbone",
    "os:system",
    "../../etc/passwd",
    "\x1b[2J\u202e\n\0",
    "\ud800",
    "a" * 100_000,
    "(a+)+$",
    "(" * 5000,
    [],
    {},
    [[]],
    ["0", "2"],
    ["0"] * 10_000,
    {"0": 2},
    {"a": {"b": [1]}},
    json.loads("[" * 300 + "]" * 300),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value, the whole one included."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(part, (*path, key))


def mutate(value: Any, choice: random.Random) -> Any:
    """Replace, remove, repeat or add one part of a JSON value."""
    value = copy.deepcopy(value)
    *way, key = choice.choice([path for path in places(value) if path])
    holder = value
    for step in way:
        holder = holder[step]
    act = choice.randrange(6)
    if act == 0:
        del holder[key]
    elif act == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif act == 2 and isinstance(holder, dict):
        holder[choice.choice(["x", "rnak", "__class__", "\x1b[2J"])] = choice.choice(ODD)
    elif act == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] += choice.choice([-1, 1, 0.5, 10**9])
    else:
        holder[key] = choice.choice(ODD)
    return value


def mutate_tensors(tensors: dict[str, Tensor], choice: random.Random) -> None:
    """Rename, remove, add, cast or cut one tensor."""
    name = choice.choice(sorted(tensors))
    tensor = tensors.pop(name)
    act = choice.randrange(6)
    if act == 0:
        return
    if act == 1:
        name = choice.choice(["x", name + "x", "saved.0.bias", "saved." + name, "\x1b[2J\u202e", "lambda.0x0.0"])
    elif act == 2:
        other = choice.choice(["bases.A", "saved.2", "saved.0.weight", "base_model.model.2.weight", "y" * 9999])
        tensors[other] = tensor + 1
    elif act == 3:
        tensor = tensor.to(choice.choice([torch.int32, torch.bool, torch.complex64, torch.int64]))
    elif act == 4:
        tensor = tensor.reshape(-1)[: choice.randrange(tensor.numel())]
    else:
        tensor = tensor[None] if choice.random() < 0.5 else tensor.flatten(0, max(0, tensor.ndim - 2))
    tensors[name] = tensor.contiguous()


def outcome(read: Callable[[], object], path: Path) -> object:
    """What `read` returns, or None after a ValueError or OSError of one short printable line, in bounded time."""
    started = time.process_time()
    try:
        found = read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert len(text) <= 2000 and text.isprintable() and str(path) in text, text
        found = None
    assert time.process_time() - started < SECONDS
    return found


def loaded(path: Path) -> Tensor | None:
    """The model's answer with the adapter; the model is unchanged if it is refused."""
    model = mlp()
    before = snapshot(model)
    report = outcome(lambda: load_adapter(model, path), path)
    if report is None:
        assert snapshot(model) == before
        return None
    with torch.no_grad():
        return model.eval()(X)


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def adapted(**settings: Any) -> nn.Module:
    model = mlp()
    config = {"rank": 2, "target_modules": ["0", "2"], "modules_to_save": ["2.bias"], "seed": 3}
    inject(model, RandLoRAConfig(**{**config, **settings}))
    randomize(model)
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "names": {},
    "pattern": {"target_modules": "[02]", "rank_pattern": {"2": 3}, "bases": "sparse"},
    "structured": {"bases": "structured", "alpha": 7, "alpha_pattern": {"0": 2.5}, "dropout": 0.1},
    "peft": {"bases": "peft_sparse", "modules_to_save": []},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_mutants_of_a_file(tmp_path: Path, case: str, bounded_memory: None) -> None:
    model, choice = adapted(**SETTINGS[case]), random.Random(case)
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    expected = model.eval()(X).detach()
    original, metadata_of = opened(path)
    parsed = {key: json.loads(metadata_of[key]) for key in ("config", "bases")}
    parsed["targets"] = json.loads(zlib.decompress(b64decode(metadata_of["targets"])))
    same = 0
    for number in range(120):
        tensors, values = dict(original), dict(parsed)
        if number % 4 == 3:
            mutate_tensors(tensors, choice)
        else:
            values = mutate(parsed, choice)
        texts = {key: json.dumps(value) for key, value in values.items()}
        if "targets" in texts:
            texts["targets"] = b64encode(zlib.compress(texts["targets"].encode())).decode()
        metadata = {key: text for key, text in metadata_of.items() if key not in parsed} | texts
        seal(tensors, metadata)
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        answer = loaded(path)
        if answer is not None:
            same += 1
            assert torch.equal(answer, expected), values
        outcome(lambda: layers_of(path, bundle.read(path), lambda done, total: None), path)
        outcome(lambda: num_classes(path), path)
        outcome(lambda: weighted_sum_files({path: 1}, tmp_path / "sum.safetensors"), path)
    assert 0 < same < 120


def test_mutants_of_a_bundle(tmp_path: Path) -> None:
    from randlora_vision.adapters.checkpoint import packed

    path, choice = tmp_path / "adapter.safetensors", random.Random(0)
    bundle.write(path, {part: packed(adapted(), "default") for part in ("unet", "text_encoder")})
    tensors, metadata = opened(path)
    parts = json.loads(metadata["parts"])
    for _ in range(60):
        metadata["parts"] = json.dumps(mutate(parts, choice))
        seal(tensors, metadata)
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        outcome(lambda: bundle.read(path), path)


NUMBERS = {"randlora_alpha"}
"""Settings of PEFT that change the numbers, and nothing in the folder says what they were in training."""


@pytest.fixture
def peft() -> None:
    """Imported before the memory is measured."""
    import peft  # noqa: F401


def test_mutants_of_a_folder(tmp_path: Path, peft: None, bounded_memory: None) -> None:
    from tests.peft_helpers import folder, trained

    path = folder(tmp_path / "peft", trained(mlp(), target_modules=["0", "2"], r=2, bias="all"))
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    original, settings, choice = safetensors.torch.load_file(weights), json.loads(config.read_text()), random.Random(1)
    settings["target_modules"] = ["0", "2"]  # PEFT writes a set
    expected, same = loaded(path), 0
    assert expected is not None
    for number in range(160):
        tensors, values = dict(original), dict(settings)
        if number % 3 == 2:
            mutate_tensors(tensors, choice)
        else:
            values = mutate(settings, choice)
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
        config.write_text(json.dumps(values))
        answer = loaded(path)
        untouched = all(values.get(key) == settings[key] for key in NUMBERS) and tensors.keys() == original.keys()
        if answer is not None and untouched:
            same += 1
            assert torch.equal(answer, expected), values
    assert 0 < same < 160


EVIL = "(a+)+c|0"
"""It takes for ever on a long row of a's."""


def long_names() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 6))
    model.add_module("a" * 60, nn.Linear(6, 5))
    return model


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [EVIL, "(?i:[\0-\U0010ffff])" * 3000, "(" * 9000, "a{99999999999999999999}"])
def test_a_pattern_in_a_file_is_never_run_or_compiled(tmp_path: Path, key: str, pattern: str) -> None:
    model = long_names()
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"]))
    randomize(model)
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    rewritten(path, edit("config", **{key: pattern}))
    fresh, started = long_names(), time.process_time()
    config = load_adapter(fresh, path).config
    again = save_adapter(fresh, tmp_path / "again.safetensors")
    assert time.process_time() - started < SECONDS
    assert torch.equal(fresh(X), model(X)) and getattr(config, key) == pattern
    assert json.loads(safetensors.safe_open(again, "pt").metadata()["config"])[key] == pattern
    with pytest.raises(ValueError, match=f"{key} is a regular expression from an adapter file, which is never run"):
        inject(long_names(), config)


def test_a_pattern_in_a_folder_is_never_run(tmp_path: Path) -> None:
    from tests.peft_helpers import folder, trained

    path = folder(tmp_path / "peft", trained(long_names(), target_modules=["0"], r=2))
    config = path / "adapter_config.json"
    for changes in ({"target_modules": EVIL}, {"target_modules": ["0"] * 10**5}, {"modules_to_save": ["x"] * 10**5}):
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        started = time.process_time()
        assert [target.name for target in load_adapter(long_names(), path).targets] == ["0"]
        assert time.process_time() - started < SECONDS
