"""Versions of the installed packages that a result can depend on."""

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
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
