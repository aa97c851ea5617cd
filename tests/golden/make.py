"""Write the golden files that do not exist yet: ``python tests/golden/make.py``.

A golden file is never written again: that this version's and every later one's reader gives the pinned numbers is the
promise of docs/compatibility.md. To pin something new, add a case below and run this. NAME.expected.safetensors holds
the updates of the weights, and what was trained in full, for version_3/NAME.safetensors, for NAME.safetensors beside it
(versions 1 and 2 of the format, which nothing writes any more), or for the folder NAME that PEFT wrote.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, load_adapter, save_adapter
from randlora_vision.bases.stored import stored_bases
from randlora_vision.config import BASES_KINDS
from randlora_vision.injection.inject import add_adapter
from randlora_vision.injection.plan import make_plan
from randlora_vision.layers.adapted import adapted_modules

HERE = Path(__file__).parent
NEWEST = HERE / "version_3"
"""The folder of files of the version that is written."""


def numbers(shape: tuple[int, ...], step: int) -> Tensor:
    """Multiples of 1/64 in [-1, 1) that no random generator makes: exact, and the same for ever."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * step + step // 3) % 128 - 64).reshape(shape) / 64


class Net(nn.Module):
    """A tall, a wide and a square layer, packed attention, a convolution, a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide, self.square = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(7, 7)
        self.attention = nn.MultiheadAttention(6, 2)
        self.patch = nn.Conv2d(2, 5, 2)
        self.norm = nn.BatchNorm1d(4)


def base() -> nn.Module:
    """The base model of every golden file."""
    model = Net()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(tuple(parameter.shape), 2 * i + 37))
    return model


def fill(model: nn.Module, adapter_name: str = "default") -> None:
    """Give an adapter its pinned numbers."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(adapter_parameters(model, adapter_name)):
            parameter.copy_(numbers(tuple(parameter.shape), 2 * i + 29))
        for i, parameter in enumerate(
            p for n, p in model.named_parameters() if p.requires_grad and "_randlora_" not in n
        ):
            parameter.copy_(numbers(tuple(parameter.shape), 2 * i + 51))


def observed(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The dense updates of the active adapters in float64, rounded to float32, and all else that is not the base's."""
    model = model.double()
    plain = dict(base().double().named_parameters())
    found = {}
    for path, module, param, _ in adapted_modules(model):
        update = getattr(module, param).detach() - module.base_weight(param)
        found[f"update.{path}.{param}"] = update.float().contiguous()
    adapted = {name.removeprefix("update.") for name in found}
    for name, tensor in model.named_parameters():
        if name in plain and name not in adapted and not torch.equal(tensor, plain[name]):
            found[f"saved.{name}"] = tensor.detach().float()
    return found


def config(**settings: object) -> RandLoRAConfig:
    """Rank 3 and uniform bases on the three linear layers, unless told otherwise."""
    return RandLoRAConfig(
        **{
            "rank": 3,
            "alpha": 6,
            "bases": "uniform",
            "seed": 11,
            "target_modules": ["tall", "wide", "square"],
            **settings,
        }
    )  # type: ignore[arg-type]


def own(settings: RandLoRAConfig) -> Callable[[Path], None]:
    """Writer of an adapter file."""

    def write(path: Path) -> None:
        model = base()
        if settings.bases == "stored":
            add_adapter(
                make_plan(model, settings, "default", stored_bases(numbers((3, 7), 41), numbers((10, 9), 43))),
                trainable=True,
            )
        else:
            inject(model, settings)
        fill(model)
        save_adapter(model, path)

    return write


def bundle(path: Path) -> None:
    """Two models in one file."""
    from randlora_vision.adapters.checkpoint import packed
    from randlora_vision.files import bundle as format_

    parts = {}
    for name, bases in (("unet", "uniform"), ("text_encoder", "sparse")):
        model = base()
        inject(model, config(bases=bases))
        fill(model)
        parts[name] = packed(model, "default")
    format_.write(path, parts)


def peft(settings: dict[str, object]) -> Callable[[Path], None]:
    """Writer of a folder, by PEFT itself."""

    def write(path: Path) -> None:
        import peft as library

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {"r": 3, "randlora_alpha": 6, "target_modules": ["tall", "wide", "square"], **settings}
            model = library.get_peft_model(base(), library.RandLoraConfig(**wanted))
            with torch.no_grad():
                trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
                for i, (_, parameter) in enumerate(trained):
                    parameter.copy_(numbers(tuple(parameter.shape), 2 * i + 29))
            model.save_pretrained(path)
        (path / "README.md").unlink()

    return write


FILES: dict[str, Callable[[Path], None]] = {
    **{kind: own(config(bases=kind)) for kind in BASES_KINDS},
    "all_layers": own(config(target_modules="all", rank_pattern={"square": 2}, alpha_pattern={"tall": 9.0})),
    "gamma_zero": own(config(init="gamma-zero", dropout=0.1, exclude_modules=["wide"], seed=2**64 - 1)),
    "saved_modules": own(config(modules_to_save=["norm", "patch.bias"])),
}
"""Name of NAME.safetensors -> its writer: every kind of bases, and the other things that a file can hold."""

FOLDERS: dict[str, Callable[[Path], None]] = {
    "peft_folder_stored": peft({"bias": "randlora_only", "modules_to_save": ["norm"]}),
    "peft_folder_seed_only": peft({"save_projection": False, "sparse": True, "projection_prng_key": 5}),
}


def load(path: Path) -> dict[str, Tensor]:
    """What the library makes of a golden file or folder."""
    model = base()
    load_adapter(model, path)
    return observed(model)


def load_bundle(path: Path) -> dict[str, Tensor]:
    """What it makes of a bundle, part by part."""
    from randlora_vision.adapters.checkpoint import install, plan_for
    from randlora_vision.files import bundle as format_

    found = {}
    for part, content in format_.read(path).items():
        model = base()
        install(plan_for(model, content, "default", path), content, False)
        found.update({f"{part}/{name}": tensor for name, tensor in observed(model).items()})
    return found


def main() -> None:
    """Write what is missing."""
    paths = {NEWEST / f"{name}.safetensors": write for name, write in {**FILES, "bundle": bundle}.items()}
    paths.update({HERE / name: write for name, write in FOLDERS.items()})
    for path, write in paths.items():
        expected = HERE / f"{path.stem}.expected.safetensors"
        if not path.exists():
            write(path)
            print(f"wrote {path.name}", file=sys.stderr)
        if not expected.exists():
            read = load_bundle if path.stem == "bundle" else load
            safetensors.torch.save_file(read(path), expected)


if __name__ == "__main__":
    main()
