"""`randlora doctor`: versions, devices, and a self-check of every installed host. Needs no library of the command."""

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, load_adapter, merge, remove, save_adapter, suggest_lr
from randlora_vision.errors import one_line, without_logs
from randlora_vision.names import printable
from randlora_vision.versions import versions

_TRAIN = ("accelerate", "datasets", "docstring_parser", "matplotlib", "peft", "sklearn", "tensorboard", "tqdm", "tyro")
_TOLERANCE = 1e-4  # of merged outputs, relative to the largest output


@dataclass(frozen=True)
class Host:
    """A library, and a small model of it: how it is built, run, and adapted."""

    module: str
    extra: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.device], Tensor]
    targets: str


@dataclass(frozen=True)
class Check:
    """The outcome for one host: "passed", "FAILED" or "missing", and a line about it."""

    host: str
    result: str
    detail: str


def doctor(argv: Sequence[str]) -> int:
    """Print what is installed and run the self-check; return 1 if a check failed, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="randlora doctor", description="Versions, devices and a self-check.")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--device", default=_best_device(), help="where the checks run (%(default)s)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    checks = []
    if not options.json:
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        print(f"Python {platform.python_version()}, {platform.platform()}\n{', '.join(_devices())}\n", flush=True)
    for name, host in HOSTS.items():
        checks.append(_check(name, host, device))
        if not options.json:
            print(_line(checks[-1]), flush=True)
    checks.append(_scripts())
    failed = sum(check.result == "FAILED" for check in checks)
    if options.json:
        found = {"versions": versions(), "devices": _devices(), "checks": [asdict(check) for check in checks]}
        print(json.dumps({**found, "passed": not failed}, indent=2))
    else:
        passed = sum(check.result == "passed" for check in checks)
        print(_line(checks[-1]))
        print(f"\n{passed} passed, {failed} failed, {len(checks) - passed - failed} not installed")
    return 1 if failed else 0


def _line(check: Check) -> str:
    return printable(f"{check.result:<8} {check.host:<13} {check.detail}")


def _check(name: str, host: Host, device: torch.device) -> Check:
    if find_spec(host.module) is None:
        return Check(name, "missing", f"pip install 'randlora_vision[{host.extra}]'")
    started = time.monotonic()
    try:
        with _quiet_hosts(), torch.random.fork_rng(devices=[]):
            detail = _life(host, device)
    except Exception as error:  # whatever a host raises is the answer
        return Check(name, "FAILED", one_line(f"{type(error).__name__}: {error}")[:500])
    return Check(name, "passed", f"{detail} ({time.monotonic() - started:.1f} s)")


@contextmanager
def _quiet_hosts() -> Iterator[None]:
    """Leave out what hosts say about themselves and one another when they are imported."""
    with without_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _life(host: Host, device: torch.device) -> str:
    """Inject, step, save, reload and merge on the host's small model; raise if a step is not as it must be."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return host.build().to(device).eval()

    model = base()
    before = host.run(model, device)
    report = inject(model, RandLoRAConfig(rank=4, target_modules=host.targets))
    start = host.run(model, device)
    changed = float((start - before).detach().abs().max() / before.detach().abs().max())
    _expect(changed < _TOLERANCE, f"inject changed the output by {changed:.1e}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=suggest_lr(model))
    for _ in range(2):
        (host.run(model, device) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = host.run(model, device)
        _expect(not torch.equal(trained, start), "a training step did not change the output")
        with tempfile.TemporaryDirectory() as folder:
            path = save_adapter(model, Path(folder) / "adapter.safetensors")
            again = base()
            load_adapter(again, path)
        size = trained.abs().max()
        reloaded = float((host.run(again, device) - trained).abs().max() / size)
        _expect(reloaded < _TOLERANCE, f"the reloaded adapter differs by {reloaded:.1e} of the output")
        merge(again)
        remove(again)
        merged = float((host.run(again, device) - trained).abs().max() / size)
        _expect(merged < _TOLERANCE, f"the merged model differs by {merged:.1e} of the output")
    return f"{len(report.targets)} layers: injected, trained, saved, reloaded, merged (difference {merged:.0e})"


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _scripts() -> Check:
    absent = [name for name in _TRAIN if find_spec(name) is None]
    if absent:
        return Check("train", "missing", f"{', '.join(absent)}: pip install 'randlora_vision[train]'")
    return Check("train", "passed", "the training scripts have the libraries that they need")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices() -> list[str]:
    found = [f"CPU with {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        found.append(f"{torch.cuda.get_device_name(index)} ({bf16} bf16)")
    return found + (["MPS"] if torch.backends.mps.is_available() else [])


def _images(device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32, device=device).reshape(2, 3, 32, 32)


def _timm() -> nn.Module:
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    model: nn.Module = import_module("timm.models.vision_transformer").VisionTransformer(**options)
    return model


def _open_clip() -> nn.Module:
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    text = dict(context_length=8, vocab_size=32, width=32, heads=2, layers=2)
    model: nn.Module = import_module("open_clip").CLIP(16, vision, text)
    return model


def _both_features(model: Any, device: torch.device) -> Tensor:
    texts = torch.arange(16, device=device).reshape(2, 8)
    return torch.cat([model.encode_image(_images(device)), model.encode_text(texts)])


def _transformers() -> nn.Module:
    transformers = import_module("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model: nn.Module = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    )
    return model


def _unet() -> nn.Module:
    model: nn.Module = import_module("diffusers").UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32),
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model


def _denoised(model: Any, device: torch.device) -> Tensor:
    latents = torch.linspace(-1, 1, 2 * 4 * 8 * 8, device=device).reshape(2, 4, 8, 8)
    prompts = torch.linspace(-1, 1, 2 * 5 * 32, device=device).reshape(2, 5, 32)
    answer: Tensor = model(latents, 10, prompts).sample
    return answer


HOSTS = {
    "torch": Host(
        "torch",
        "all",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.GELU(), nn.Linear(16, 8)),
        lambda model, device: model(_images(device)),
        "all-linear",
    ),
    "timm": Host("timm", "timm", _timm, lambda model, device: model(_images(device)), "timm:backbone"),
    "open_clip": Host("open_clip", "open_clip", _open_clip, _both_features, "open_clip:both"),
    "transformers": Host(
        "transformers",
        "transformers",
        _transformers,
        lambda model, device: model(_images(device)).logits,
        "transformers:vision",
    ),
    "diffusers": Host("diffusers", "diffusers", _unet, _denoised, "diffusers:backbone"),
}
