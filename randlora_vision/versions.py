"""Versions of the installed packages that a result can depend on."""

from functools import cache
from importlib import metadata

_PACKAGES = (
    "randlora_vision",
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "timm",
    "open_clip_torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "bitsandbytes",
    "torchao",
)


def versions() -> dict[str, str]:
    """Return the versions of this package and of its host libraries by distribution name, if they are installed."""
    return {name: version for name in _PACKAGES if (version := _version(name)) is not None}


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
